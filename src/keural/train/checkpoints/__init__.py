"""Checkpoints of a stage: what they hold, how they are written beside training, and how they are believed."""
