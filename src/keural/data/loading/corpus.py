"""What a stage trains on, as directories: a token store, several as one, or published shards; and how they are mixed.

In: paths. Out: a `Stream`. Everything a `Corpus` holds is plain, so it can be kept in a job and opened in any process.
"""

from dataclasses import dataclass
from pathlib import Path

from keural.data.loading.mixture import Mixture
from keural.data.loading.row_layout import RowShape
from keural.data.loading.stream import Stream
from keural.data.tokens.published_shards import PublishedShards
from keural.data.tokens.store import TokenStore, Verify
from keural.errors import UserError
from keural.recipe import Objective


@dataclass(frozen=True)
class Corpus:
    """`names` are those of several stores; `shards` says that the one path holds published shards; `plans` is where plans of
    packed rows are kept, by default beside the store.
    """

    paths: tuple[Path, ...]
    names: tuple[str, ...] = ()
    shards: bool = False
    mixture: Mixture | None = None
    plans: Path | None = None

    def open(self, tokenizer_sha: str, vocab_size: int, verify: Verify = "auto") -> TokenStore | PublishedShards:
        """The data, checked. Raises `UserError` for what is damaged, or made with another tokenizer or vocabulary."""
        if self.shards:
            return PublishedShards(self.paths[0], vocab_size)
        stores = [TokenStore.open(path, tokenizer_sha, verify) for path in self.paths]
        for store in stores:
            if store.vocab_size > vocab_size:
                raise UserError(
                    f"{store.directory}: holds ids of a vocabulary of {store.vocab_size}, the tokenizer has {vocab_size}; "
                    "prepare the data again with this tokenizer"
                )
            if store.kind != stores[0].kind:
                raise UserError(
                    f"{store.directory}: holds {store.kind}, {stores[0].directory} {stores[0].kind}; one stage trains on one kind"
                )
        return TokenStore.join(dict(zip(self.names, stores, strict=True))) if self.names else stores[0]

    def stream(
        self,
        objective: Objective,
        sequence_length: int,
        batch_rows: int | None,
        batch_pairs: int | None,
        seed: int,
        tokenizer_sha: str,
        vocab_size: int,
        pair_rows: RowShape | None = None,
    ) -> Stream:
        """The batches. Raises `UserError` as `open` and `Stream` do."""
        opened = self.open(tokenizer_sha, vocab_size)
        return Stream(opened, objective, sequence_length, batch_rows, batch_pairs, seed, self.mixture, self.plans, pair_rows)
