"""What a step takes of a GPU's memory, by arithmetic: `keural plan` counts with it, and `train.recompute: budget` goes by it."""
