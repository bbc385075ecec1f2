"""Conversion: import of published checkpoints, export to what other engines read."""
