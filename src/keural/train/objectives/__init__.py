"""The objectives: arithmetic on the log-probabilities of labels, one file each, found by name in `registry`."""
