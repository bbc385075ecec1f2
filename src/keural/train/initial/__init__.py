"""The weights a stage starts from: whole on one process, in parts on several."""
