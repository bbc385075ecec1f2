"""Talking to a model: the decoding engine, the terminal chat, and one-shot generation."""
