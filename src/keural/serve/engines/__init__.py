"""Engines: a model and a prompt of ids in, sampled ids out; transformers and llama.cpp."""
