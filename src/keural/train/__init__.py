"""Training: one loop for every stage, three objectives, exact resume, any number of ranks."""
