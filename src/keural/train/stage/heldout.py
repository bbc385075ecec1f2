"""Held-out figures of a stage: the objective's loss and metrics over a whole held-out store, without gradients; of conversations
and pairs also source by source and language by language, where the store says which record is of which; of documents also bits per
byte, where it has their texts; of conversations the loss of each.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keural.data.loading.batch import Array, Batch
from keural.data.loading.stream import Stream
from keural.data.tokens.store import TokenStore
from keural.recipe import OBJECTIVES, ObjectiveKind, StageSpec
from keural.train.divergence import against_divergence
from keural.train.micro_batches import MicroBatch, micro_batches, rows_per_pass, to_device
from keural.train.objectives.base import figures
from keural.train.processes.parallel import reshard
from keural.train.processes.ranks import Ranks
from keural.train.reference.online import Reference, references_for
from keural.train.trainer import Trainer


@dataclass(frozen=True)
class Sources:
    """The sources of a store: their names, the sequence at which each ends, and their languages (None: not known)."""

    names: tuple[str, ...]
    stops: Array
    languages: tuple[str | None, ...]

    def of(self, sequences: Array) -> Array:
        """The number of each sequence's source, in the same shape; -1 stays -1."""
        return np.where(sequences < 0, -1, np.searchsorted(self.stops, sequences, side="right"))


@dataclass(frozen=True)
class Evaluation:
    """What was found on a held-out store."""

    figures: dict[str, float]
    """Mean loss per label or pair, the objective's metrics, and `items`, the number of labels or pairs (of weighted pairs, the sum
    of their weights); the same of each source and language, as `source/NAME/loss` and `language/ko/loss`, where the store has
    several sources and names them; `bits_per_byte` of documents whose texts it has.
    """
    items: NDArray[np.float64] | None
    """``[2, sequences]``: of each conversation the sum of its loss in nats, and its labels; None of other stores."""


def has_items(stage: StageSpec) -> bool:
    """Whether the loss of a held-out store is told item by item."""
    return OBJECTIVES[stage.objective].store == "conversations"


def sources_of(stream: Stream) -> Sources | None:
    """The sources of a held-out store of conversations or pairs; None where there are not several, or the store does not say."""
    store = stream.store
    if not isinstance(store, TokenStore) or store.kind == "documents" or len(store.sections) < 2:
        return None
    known = {row.get("source"): row.get("language") for row in store.manifest.get("sources", ())}
    names = tuple(store.sections)
    stops = np.array([stop for _, stop in store.sections.values()], dtype=np.int64)
    return Sources(names, stops, tuple(known.get(name) for name in names))


def heldout_batches(stage: StageSpec, stream: Stream, ranks: Ranks) -> Iterator[Batch]:
    """This rank's rows of the held-out store, once, as many at a time as one forward pass takes."""
    limit = stage.train.micro_batch_tokens
    default = max(1, (stage.train.batch_tokens or 8 * stream.row_length) // stream.row_length)
    rows = ranks.world * rows_per_pass(stream.row_length, limit, -(-default // ranks.world))
    for batch in stream.batches_once(rows):
        yield batch.share(ranks.rank, ranks.world)


@torch.no_grad()
def evaluate(trainer: Trainer, stream: Stream, references: Reference | None) -> Evaluation:
    """The figures of a held-out store, the same on every rank. Every rank must call it."""
    trainer = against_divergence(trainer, heldout_batches(trainer.stage, stream, trainer.ranks), references)
    ranks, names, sources = trainer.ranks, trainer.metrics, sources_of(stream)
    sums = torch.zeros(1 + (len(sources.names) if sources else 0), 2 + len(names), dtype=torch.float64)
    items = np.zeros((2, stream.store.num_sequences)) if has_items(trainer.stage) else None
    for batch in heldout_batches(trainer.stage, stream, ranks):
        for micro in micro_batches(batch, None, ranks.device):
            logprobs = trainer.policy(micro).logprobs
            known = references_for(references, micro)
            kept = known(micro.pairs.sequences) if known else None
            sums[0] += _sums(trainer, batch, micro, logprobs, kept)
            if items is not None:
                _add_items(items, batch, logprobs)
            for number, part, pairs in _parts(batch, sources) if sources else ():
                of_part = to_device(part, ranks.device)
                values = torch.where(of_part.labels >= 0, logprobs, 0.0)
                sums[1 + number] += _sums(trainer, part, of_part, values, None if kept is None else kept[:, pairs])
    reshard(trainer.policy)
    found = ranks.sum(sums.to(ranks.device)).cpu()
    kind = OBJECTIVES[trainer.stage.objective]
    measured = _means(found[0], names, kind)
    for prefix, total in _groups(found[1:], sources) if sources else ():
        measured |= {f"{prefix}/{name}": value for name, value in _means(total, names, kind).items()}
    if size := ranks.on_main(lambda: _text_bytes(stream)):
        measured["bits_per_byte"] = measured["loss"] * measured["items"] / math.log(2) / size
    if items is not None:
        items = ranks.sum(torch.from_numpy(items).to(ranks.device)).cpu().numpy()
    return Evaluation(measured, items)


def _add_items(items: NDArray[np.float64], batch: Batch, logprobs: Tensor) -> None:
    """Add the loss of each label ``[rows, T]`` of the batch, and the label itself, to its sequence."""
    labelled = batch.labels >= 0
    sequences, losses = batch.sequence_ids[labelled], -logprobs.double().cpu().numpy()[labelled]
    np.add.at(items[0], sequences, losses)
    np.add.at(items[1], sequences, 1.0)


def _text_bytes(stream: Stream) -> int | None:
    """UTF-8 bytes of the documents of a store whose tokens are all predicted, but for the first one of each."""
    store = stream.store
    return store.text_bytes if isinstance(store, TokenStore) and store.kind == "documents" else None


def _sums(trainer: Trainer, batch: Batch, micro: MicroBatch, logprobs: Tensor, references: Tensor | None) -> Tensor:
    """Denominator, loss and metrics of a forward pass, whose pairs have these reference values ``[2, pairs]``."""
    terms = trainer.objective(logprobs, micro, None if references is None else lambda _: references)
    values = torch.stack([terms.loss, *(terms.metrics[name] for name in trainer.metrics)]).double().cpu()
    return torch.cat([torch.tensor([trainer.objective.denominator(batch)], dtype=torch.float64), values])


def _parts(batch: Batch, sources: Sources) -> Iterator[tuple[int, Batch, Array]]:
    """The batch with the labels and pairs of one source alone, for each that is there; and which pairs these are."""
    found = sources.of(batch.sequence_ids)
    of_pairs = sources.of(batch.pair_sequences[0]) if len(batch.pairs) else np.zeros(0, dtype=np.int64)
    for number in np.unique(found[found >= 0]).tolist():
        pairs = np.flatnonzero(of_pairs == number)
        weights = None if batch.pair_weights is None else batch.pair_weights[pairs]
        labels = np.where(found == number, batch.labels, -100)
        desirable = None if batch.desirable is None else batch.desirable[pairs]
        part = replace(batch, labels=labels, pairs=batch.pairs[pairs], pair_weights=weights, desirable=desirable)
        yield number, part, pairs


def _groups(found: Tensor, sources: Sources) -> Iterator[tuple[str, Tensor]]:
    """The sums of every source, and of every language that is known."""
    for name, total in zip(sources.names, found, strict=True):
        yield f"source/{name}", total
    for language in sorted({each for each in sources.languages if each}):
        yield f"language/{language}", found[[each == language for each in sources.languages]].sum(0)


def _means(sums: Tensor, names: tuple[str, ...], kind: ObjectiveKind) -> dict[str, float]:
    denominator, loss, *metrics = sums.tolist()
    divisor = denominator or 1.0
    means = {name: value / divisor for name, value in zip(names, metrics, strict=True)}
    return {"loss": loss / divisor, **figures(means, kind), "items": denominator}
