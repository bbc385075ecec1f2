"""What changes weights: AdamW or Muon, their learning rate, and what is left frozen."""
