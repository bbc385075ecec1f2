"""Records to kept records: what should not be learned from, what an evaluation set holds, what was there before or is held out."""
