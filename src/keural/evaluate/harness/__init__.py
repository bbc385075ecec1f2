"""lm-evaluation-harness, extra `keural[eval]`: its tasks on a model of this package, and this package's tasks for it."""
