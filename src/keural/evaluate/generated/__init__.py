"""Tasks whose answers are written, not chosen: generation, what is taken out of an answer, code that is run, files for a judge."""
