"""Stages in order: the workspace they read, the run directory they write."""
