"""What computes: the model's own layers or the training engine, their attention, experts and head."""
