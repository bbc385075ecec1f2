"""What changes weights: AdamW over float32 or split weights, its learning rate, and what is left frozen."""
