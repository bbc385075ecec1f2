"""What each layer of a stage keeps under `train.recompute: budget`, by the memory that there is.

In: a stage, its network, the ranks. Out: the mix that is taken, the same on all ranks, with what is planned; or a `UserError` that
says what it would take.
"""

from dataclasses import dataclass

import torch

from keural.errors import UserError
from keural.model import KeuralConfig
from keural.recipe import StageSpec
from keural.train.memory.activations import Mix
from keural.train.memory.budget import best_mix, with_mix
from keural.train.memory.network import Network, network_of_config
from keural.train.memory.parts import ERROR, GIB, Layout, memory
from keural.train.memory.stage import own_layout
from keural.train.processes.ranks import Ranks


@dataclass(frozen=True)
class Kept:
    """A choice: how many layers keep what, and the GiB of one device that are planned and that there are."""

    mix: Mix
    planned: float
    available: float

    def __str__(self) -> str:
        return f"recompute budget: {self.mix} of {sum(self.mix)} layers, planned {self.planned:.3g} of {self.available:.3g} GiB"


def choose_kept(stage: StageSpec, config: KeuralConfig, ranks: Ranks) -> Kept | None:
    """What the layers of a stage keep; None where the recipe says it for all. Every rank must call it.

    Raises `UserError` where no mix takes as little as there is, and where nobody says how much there is.
    """
    if stage.train.recompute != "budget":
        return None
    available = _available(stage, ranks)
    network, layout = network_of_config(config), own_layout(stage, ranks.world)
    mix = best_mix(network, layout, available + _without_cards(network, layout, ranks))
    if mix is None:
        least = _planned(network, with_mix(layout, Mix(full=config.num_hidden_layers)), ranks)
        raise UserError(
            f"{stage.name}: train.recompute budget: with all layers in full a step takes {least * ERROR:.2g} GiB by plan, "
            f"and there are {available / GIB:.2g}; lower train.micro_batch_tokens, take a train.precision with fewer bytes, or "
            "train.recompute full to try it all the same"
        )
    return Kept(mix, _planned(network, with_mix(layout, mix), ranks), available / GIB)


def check_memory_is_known(stage: StageSpec, device: torch.device) -> None:
    """Refuse a stage that goes by memory that nobody states, where the device has none of its own. Raises `UserError`."""
    if stage.train.recompute == "budget" and stage.train.memory_gib is None and device.type != "cuda":
        raise UserError(
            f"{stage.name}: train.recompute budget goes by an accelerator's memory, and there is none; give train.memory_gib"
        )


def _available(stage: StageSpec, ranks: Ranks) -> float:
    """Bytes that a stage may take of each device."""
    stated = stage.train.memory_gib
    check_memory_is_known(stage, ranks.device)
    if ranks.device.type != "cuda":
        assert stated is not None
        return stated * GIB
    there = min(ranks.gather(torch.cuda.mem_get_info(ranks.device)[1]))
    if stated is not None and stated * GIB > there:
        raise UserError(f"{stage.name}: train.memory_gib {stated:g} is more than a device has, {there / GIB:.2f}; lower it")
    return there if stated is None else stated * GIB


def _without_cards(network: Network, layout: Layout, ranks: Ranks) -> float:
    """Bytes that are planned for what only cards have: the context of CUDA, and NCCL."""
    full = with_mix(layout, Mix(full=network.model.num_hidden_layers))
    return 0.0 if ranks.device.type == "cuda" else memory(network, full).parts["slack"] * ERROR


def _planned(network: Network, layout: Layout, ranks: Ranks) -> float:
    """GiB of one device."""
    return (memory(network, layout).total - _without_cards(network, layout, ranks) / ERROR) / GIB
