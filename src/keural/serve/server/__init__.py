"""The server: a model behind an API that clients of others already speak, for many at once."""
