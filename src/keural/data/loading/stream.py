"""The stream: which tokens an optimizer step sees, as a pure function of (data, settings, seed, step).

There is no iterator state. An epoch is a permutation of the data's instances, taken batch by batch; where an epoch ends inside a
batch, the next one fills it, so every step has the same size. So any batch can be made again, resuming is exact and costs
nothing, and the number of ranks and micro-batches does not change what a step is.

- documents are concatenated, and an instance is a chunk of T tokens. Nothing is in memory. Of published shards an instance is a
  sequence as it stands there, its padding included.
- of conversations an instance is a row of T in which whole ones are packed; the plan is made once and kept.
- of preference pairs an instance is a pair, and steps have about equally many tokens (`EpochOrder`); the pairs of a step are put
  into rows of the length that fits them, a pair never divided (`lay_out`). How the rows are cut depends on the ranks, what is in a
  step does not. Of labelled answers an instance is one, and what it is compared with has rows of its own.

With a mixture the epoch is a list of ranges of the store instead of the store: a section is there as often as its weight asks, and
chunks, plan and pairs are those of these ranges.

Packed neighbours are told apart by positions that restart at 0 with every document, and at the start of a row.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from keural.data.loading.batch import Batch, Segment, segments_of
from keural.data.loading.epoch_order import ORDER_VERSION, EpochOrder
from keural.data.loading.instances import STORE_INSTANCES, Instances, ShardSequences
from keural.data.loading.mixture import Mixture
from keural.data.loading.packing_plan import PLAN_VERSION
from keural.data.loading.row_layout import RowShape
from keural.data.tokens.published_shards import PublishedShards
from keural.data.tokens.store import TokenStore
from keural.errors import UserError
from keural.files import fingerprint
from keural.recipe import OBJECTIVES, Objective


class Stream:
    """Batches of a store, or of published shards, for one objective. See the module's docstring for what an instance is.

    `batch_rows` or, where the objective counts pairs or answers, `batch_pairs` is the size of an optimizer step, `sequence_length`
    T.
    `mixture` is one of this store; `plans` is where plans are kept, by default beside the store; `pair_rows` is what rows of pairs
    may be, by default at most 2 T.

    Raises `UserError` when the store is of another kind or holds a conversation (or side of a pair) longer than T, and for shards
    whose sequences are not of length T.
    """

    def __init__(
        self,
        store: TokenStore | PublishedShards,
        objective: Objective,
        sequence_length: int,
        batch_rows: int | None = None,
        batch_pairs: int | None = None,
        seed: int = 0,
        mixture: Mixture | None = None,
        plans: Path | None = None,
        pair_rows: RowShape | None = None,
    ) -> None:
        size = batch_rows if OBJECTIVES[objective].unit == "tokens" else batch_pairs
        assert size, "what counts pairs or answers takes batch_pairs, what counts tokens batch_rows"
        check_store(store, objective, sequence_length)
        self.store, self.objective, self.sequence_length, self.seed = store, objective, sequence_length, seed
        self.batch_size = size
        self.instances = _instances(store, sequence_length, mixture, plans, pair_rows)
        self.row_length = self.instances.row_length
        settings = {
            "store": store.fingerprint,
            "objective": objective,
            "length": sequence_length,
            "batch": size,
            "seed": seed,
            "plan": PLAN_VERSION,
        }
        if OBJECTIVES[objective].unit != "tokens":
            settings["order"] = ORDER_VERSION
        self.fingerprint = fingerprint(settings | ({"mixture": mixture.fingerprint} if mixture else {}))

    @property
    def instances_per_epoch(self) -> int:
        """Chunks, packed rows, pairs or sequences of shards in one epoch."""
        return len(self.instances)

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which every token has been seen once; the last one of an epoch may reach into the next."""
        return self.steps_for(1)

    def steps_for(self, epochs: float) -> int:
        """Steps that see `epochs` times the epoch, rounded up."""
        return max(1, int(np.ceil(epochs * self.instances_per_epoch / self.batch_size - 1e-9)))

    @property
    def epoch_work(self) -> int:
        """How much an epoch has to compute on: the tokens of its pairs, of other data its rows."""
        lengths = self.instances.lengths
        return len(self.instances) if lengths is None else int(lengths.sum())

    def work(self, step: int) -> float:
        """How much a step has to compute on, as a multiple of the mean step's."""
        lengths = self.instances.lengths
        return 1.0 if lengths is None else float(lengths[self._order.step(step)].mean() / lengths.mean())

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The batch of optimizer step `step`, or rank `rank`'s share of it (rows ``rank::world``, equally many on each)."""
        assert step >= 0
        assert 0 <= rank < world
        batch = self.instances.batch(self._order.step(step), world)
        self.store.forget_pages()
        return batch.share(rank, world)

    def batches_once(self, rows: int) -> Iterator[Batch]:
        """The whole epoch once, in order, at most `rows` rows (of `row_length`) at a time: for evaluation."""
        return self.instances.once(rows)

    def describe(self, step: int) -> list[list[Segment]]:
        """What the rows of `step` are made of."""
        batch = self.batch(step)
        return [segments_of(segments, ids) for segments, ids in zip(batch.segment_ids, batch.sequence_ids, strict=True)]

    @cached_property
    def _order(self) -> EpochOrder:
        return EpochOrder(len(self.instances), self.batch_size, self.seed, self.instances.lengths)


def _instances(
    store: TokenStore | PublishedShards, length: int, mixture: Mixture | None, plans: Path | None, pair_rows: RowShape | None
) -> Instances:
    if isinstance(store, PublishedShards):
        return ShardSequences(store)
    return STORE_INSTANCES[store.kind](store, length, mixture, plans or store.directory.parent, pair_rows)


def check_store(store: TokenStore | PublishedShards, objective: Objective, length: int) -> None:
    """Raise `UserError` unless the data is of the kind that the objective trains on, and fits rows of `length`."""
    needed = OBJECTIVES[objective].store
    if store.kind != needed:
        raise UserError(f"{store.directory}: holds {store.kind}; objective {objective} needs {needed}")
    if isinstance(store, PublishedShards):
        if store.length != length:
            raise UserError(
                f"{store.directory}: its sequences have {store.length} tokens, data.sequence_length is {length}; set it to "
                f"{store.length}, or make a store of the shards (keural data import) and give that"
            )
    elif needed != "documents" and store.longest > length:
        raise UserError(
            f"{store.directory}: its longest sequence has {store.longest} tokens, more than data.sequence_length {length}; "
            "prepare the data with this length"
        )
