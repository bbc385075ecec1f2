"""Model directories: weights, configuration, tokenizer and lineage, in the form that transformers loads."""
