"""What an optimizer step works on: `Trainer`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from keural.data.loading.stream import Stream
from keural.recipe import OBJECTIVES, StageSpec
from keural.train.objectives.base import Objective, References
from keural.train.policy import Policy
from keural.train.ranks import Ranks


@dataclass(frozen=True)
class Trainer:
    """Everything a step needs."""

    stage: StageSpec
    policy: Policy
    optimizer: torch.optim.Optimizer
    objective: Objective
    stream: Stream
    ranks: Ranks
    learning_rate: Callable[[int], float]
    """Of each step, counted from 0."""
    references: References | None = None
    """Of the sequences of `stream`'s store, where the objective needs them."""

    @property
    def top_k(self) -> int:
        """Experts per token."""
        return int(self.policy.model.config.num_experts_per_tok)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what the objective reports beside its loss."""
        return OBJECTIVES[self.stage.objective].metrics
