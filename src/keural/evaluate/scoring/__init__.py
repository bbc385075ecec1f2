"""One scorer: log-probabilities of continuations, what requests share computed once."""
