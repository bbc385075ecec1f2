"""What an optimizer step works on: `Trainer`."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from keural.data.loading.stream import Stream
from keural.recipe import StageSpec
from keural.train.network.policy import Policy
from keural.train.objectives.base import Objective
from keural.train.optimization.optimizer import Optimizer
from keural.train.processes.ranks import Ranks
from keural.train.reference.online import Reference
from keural.train.stage.health import SpikeGuard


@dataclass
class PreviousLoad:
    """Assignments per layer and expert ``[L, E]`` of the step before, over all ranks; None before the first step."""

    counts: Tensor | None = None


@dataclass(frozen=True)
class Trainer:
    """Everything a step needs."""

    stage: StageSpec
    policy: Policy
    optimizer: Optimizer
    objective: Objective
    stream: Stream
    ranks: Ranks
    learning_rate: Callable[[int], float]
    """Of each step, counted from 0."""
    references: Reference | None = None
    """Of the pairs of `stream`'s store, where the objective needs them."""
    previous: PreviousLoad = field(default_factory=PreviousLoad)
    """What `router.load: lagged` balances by."""
    guard: SpikeGuard = field(default_factory=SpikeGuard)
    """Which steps are not taken."""
    before_update: Callable[[], None] = lambda: None
    """Called before weights and moments are changed: a checkpoint may still be copying them."""

    def previous_load(self) -> Tensor:
        """Assignments per layer and expert ``[L, E]`` of the step before; even before the first step."""
        if self.previous.counts is not None:
            return self.previous.counts
        config = self.policy.model.config
        return torch.ones(config.num_hidden_layers, config.num_local_experts, device=self.ranks.device)

    @property
    def top_k(self) -> int:
        """Experts per token."""
        return int(self.policy.model.config.num_experts_per_tok)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what the objective reports beside its loss."""
        return self.stage.metrics
