"""Log-probabilities of the model that a stage starts from: kept by pair on disk, or computed in the step by a frozen copy."""
