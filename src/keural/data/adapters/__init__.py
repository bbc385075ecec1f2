"""Adapters: what a row of a known shape means, as a document, a conversation, a preference pair, or a drop with its reason.

All have one signature, `(value, source, where) -> record or drop`, and are found by name in `ADAPTERS`. Besides that an adapter
says which kind of record it gives, which formats it reads and which options it takes; `keural.data.sources` checks recipes
against that.
"""

from keural.data.adapters import aihub, conversations, corpora, documents, evaluation, microworld, passages, preferences, published
from keural.data.adapters.base import Adapter
from keural.errors import UserError, nearest
from keural.recipe import SourceSpec

ADAPTERS: dict[str, Adapter] = {
    **documents.ADAPTERS,
    **corpora.ADAPTERS,
    **conversations.ADAPTERS,
    **passages.ADAPTERS,
    **preferences.ADAPTERS,
    **published.ADAPTERS,
    **aihub.ADAPTERS,
    **microworld.ADAPTERS,
}
"""Adapters of what a stage trains on."""
_KNOWN = ADAPTERS | evaluation.ADAPTERS

__all__ = ["ADAPTERS", "Adapter", "adapter_of"]


def adapter_of(source: SourceSpec) -> Adapter:
    """The adapter of a source, those of evaluation sets included. Raises `UserError` naming the nearest one."""
    if source.adapter not in _KNOWN:
        raise UserError(f"source {source.name!r}: unknown adapter {source.adapter!r}{nearest(source.adapter, _KNOWN)}")
    return _KNOWN[source.adapter]
