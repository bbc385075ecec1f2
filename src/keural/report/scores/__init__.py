"""The scores of a run's stages, as one table."""
