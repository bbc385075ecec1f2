"""Adapters: what a row of a known shape means, as a document, a conversation, a preference pair, or a drop with its reason.

All have one signature, `(value, source, where) -> record or drop`, and are found by name in `ADAPTERS`. Besides that an adapter
says which kind of record it gives, which formats it reads and which options it takes; `keural.data.sources` checks recipes
against that.
"""

from keural.data.adapters import aihub, conversations, corpora, documents, microworld, preferences, published
from keural.data.adapters.base import Adapter

ADAPTERS: dict[str, Adapter] = {
    **documents.ADAPTERS,
    **corpora.ADAPTERS,
    **conversations.ADAPTERS,
    **preferences.ADAPTERS,
    **published.ADAPTERS,
    **aihub.ADAPTERS,
    **microworld.ADAPTERS,
}

__all__ = ["ADAPTERS", "Adapter"]
