"""Held-out figures of a stage: the objective's loss and metrics over a whole held-out store, without gradients."""

from collections.abc import Iterator

import torch

from keural.data.loading.batch import Batch
from keural.data.loading.stream import Stream
from keural.recipe import StageSpec
from keural.train.micro_batches import micro_batches, rows_per_pass
from keural.train.parallel import reshard
from keural.train.ranks import Ranks
from keural.train.reference.online import Reference, references_for
from keural.train.trainer import Trainer


def heldout_batches(stage: StageSpec, stream: Stream, ranks: Ranks) -> Iterator[Batch]:
    """This rank's rows of the held-out store, once, as many at a time as one forward pass takes."""
    limit = stage.train.micro_batch_tokens
    default = max(1, (stage.train.batch_tokens or 8 * stream.row_length) // stream.row_length)
    rows = ranks.world * rows_per_pass(stream.row_length, limit, -(-default // ranks.world))
    for batch in stream.batches_once(rows):
        yield batch.share(ranks.rank, ranks.world)


@torch.no_grad()
def evaluate(trainer: Trainer, stream: Stream, references: Reference | None) -> dict[str, float]:
    """Mean loss per label or pair of a held-out store, the objective's metrics, and `items`, the number of labels or pairs (of
    weighted pairs, the sum of their weights).
    """
    ranks, names = trainer.ranks, trainer.metrics
    sums = torch.zeros(2 + len(names), dtype=torch.float64)
    for batch in heldout_batches(trainer.stage, stream, ranks):
        for micro in micro_batches(batch, None, ranks.device):
            terms = trainer.objective(trainer.policy(micro).logprobs, micro, references_for(references, micro))
            sums[1:] += torch.stack([terms.loss, *(terms.metrics[name] for name in names)]).double().cpu()
        sums[0] += trainer.objective.denominator(batch)
    reshard(trainer.policy)
    denominator, loss, *metrics = ranks.sum(sums.to(ranks.device)).tolist()
    divisor = denominator or 1.0
    means = {name: value / divisor for name, value in zip(names, metrics, strict=True)}
    return {"loss": loss / divisor, **means, "items": denominator}
