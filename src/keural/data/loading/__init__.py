"""Stores to batches: `Stream.batch(step)` is a pure function of recipe, store, seed and step."""
