"""Fixes the number of threads."""

from tests.helpers.threads import one_thread

__all__ = ["one_thread"]
