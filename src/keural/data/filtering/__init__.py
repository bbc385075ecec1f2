"""Records to kept records: gates, decontamination, what is held out."""
