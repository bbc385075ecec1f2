"""A stage from its first step to its last: how it is opened, its plan, checkpoints, figures and health."""
