"""What is in a token store, as text again: to look for something in exactly what a stage was trained on.

In: a store or published shards, and the tokenizer. Out: texts, one for each sequence. A conversation is its turns' contents, one
below the other, without the roles: as it was looked through before it was tokenized.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from keural.data.tokens.published_shards import PublishedShards
from keural.data.tokens.store import TokenStore
from keural.tokenizer import KeuralTokenizer


def stored_texts(store: TokenStore | PublishedShards, tokenizer: KeuralTokenizer) -> Iterator[str]:
    """The text of every sequence, in the order of the store; of published shards that of every document.

    Raises `UserError` for shards that are damaged.
    """
    if isinstance(store, PublishedShards):
        yield from _published(store, tokenizer)
        return
    for number in range(store.num_sequences):
        ids = store.sequence(number).tolist()
        yield tokenizer.decode(ids) if store.kind == "documents" else "\n".join(_turns(ids, tokenizer))


def _published(shards: PublishedShards, tokenizer: KeuralTokenizer) -> Iterator[str]:
    for number in range(shards.num_sequences):
        ids, documents, starts = shards.read(number)
        for part in np.split(np.arange(len(ids)), np.flatnonzero(starts)):
            if len(inside := part[documents[part]]):
                yield tokenizer.decode(ids[inside].tolist())


def _turns(ids: Sequence[int], tokenizer: KeuralTokenizer) -> Iterator[str]:
    """The contents of a conversation's turns: what lies between the line of the role and `<|im_end|>`."""
    start = None
    for place, token in enumerate(ids):
        if token == tokenizer.im_start_id:
            start = place + 1
        elif token == tokenizer.im_end_id and start is not None:
            yield tokenizer.decode(ids[start:place]).partition("\n")[2]
            start = None
