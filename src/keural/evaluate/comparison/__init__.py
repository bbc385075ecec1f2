"""Two models on the same items: what differs, how surely, and what that makes of a run's stages."""
