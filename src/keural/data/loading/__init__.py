"""Token stores to batches: `Stream.batch(step)` is a pure function of store, settings, seed and step."""
