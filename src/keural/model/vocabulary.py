"""More ids for a model: rows for added tokens, such as the two ChatML markers of a base model."""

import torch

from .modeling_keural import KeuralMoECausalLM

_ROWS = 4096
"""Rows added up at a time; a whole embedding in double precision is 4 GB at full size."""


@torch.no_grad()
def grow_vocabulary(model: KeuralMoECausalLM, vocab_size: int) -> None:
    """Append embedding rows up to `vocab_size`, each the mean of the rows before them; the tied head and the config follow.

    The mean keeps a new token's logit near the average one, so that it neither dominates nor vanishes before it is trained.
    Raises ValueError when `vocab_size` is smaller than the present one.
    """
    old = model.get_input_embeddings().weight
    before = old.shape[0]
    if vocab_size < before:
        raise ValueError(f"a vocabulary of {before} cannot shrink to {vocab_size}; use a tokenizer with more ids")
    mean = mean_row(old)
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    model.get_input_embeddings().weight[before:] = mean


def with_mean_rows(weight: torch.Tensor, count: int) -> torch.Tensor:
    """`[V, H]` and `count` rows more, each the mean of the others: what `grow_vocabulary` makes of an embedding."""
    return torch.cat([weight, mean_row(weight).expand(count, -1)]) if count else weight


def mean_row(weight: torch.Tensor) -> torch.Tensor:
    """The mean of the rows of `[V, H]`, added up in double precision; `[H]` in the dtype of `weight`."""
    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for rows in weight.split(_ROWS):
        total += rows.double().sum(dim=0)
    return (total / weight.shape[0]).to(weight.dtype)
