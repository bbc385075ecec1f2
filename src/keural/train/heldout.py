"""Held-out figures of a stage: the objective's loss and metrics over a whole held-out store, without gradients."""

from collections.abc import Iterator

import torch

from keural.data.loading.stream import Batch, Stream
from keural.train.loop import Trainer
from keural.train.micro_batches import micro_batches, rows_per_pass
from keural.train.objectives.base import References
from keural.train.parallel import reshard


def heldout_batches(trainer: Trainer, stream: Stream) -> Iterator[Batch]:
    """This rank's rows of the held-out store, once, as many at a time as one forward pass takes."""
    ranks, limit = trainer.ranks, trainer.stage.train.micro_batch_tokens
    default = max(1, (trainer.stage.train.batch_tokens or 8 * stream.row_length) // stream.row_length)
    rows = ranks.world * rows_per_pass(stream.row_length, limit, -(-default // ranks.world))
    for batch in stream.batches_once(rows):
        yield batch.share(ranks.rank, ranks.world)


@torch.no_grad()
def evaluate(trainer: Trainer, stream: Stream, references: References | None) -> dict[str, float]:
    """Mean loss per item (labelled token or pair) of a held-out store, the objective's metrics, and the number of items."""
    ranks, names = trainer.ranks, trainer.objective.metrics
    sums = torch.zeros(2 + len(names), dtype=torch.float64)
    for batch in heldout_batches(trainer, stream):
        for micro in micro_batches(batch, None, ranks.device):
            task = trainer.objective(trainer.policy(micro.input_ids, micro.position_ids, micro.labels).logprobs, micro, references)
            values = torch.stack([task.loss, *task.metrics.values()]).double().cpu()
            sums += torch.cat([torch.tensor([float(trainer.objective.items(micro.rows))]).double(), values])
    reshard(trainer.policy)
    items, loss, *metrics = ranks.sum(sums.to(ranks.device)).tolist()
    items_or_one = max(items, 1.0)
    means = {name: value / items_or_one for name, value in zip(names, metrics, strict=True)}
    return {"loss": loss / items_or_one, **means, "items": items}
