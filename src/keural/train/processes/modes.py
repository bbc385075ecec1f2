"""What a stage's settings mean on so many processes: which mode runs where, what computes, how tensors are divided.

In: a stage's settings, the number of processes, shapes. Out: answers that the trainer acts by and `keural plan` counts with. torch
is not needed.
"""

import os
from collections.abc import Sequence
from math import gcd
from typing import Protocol

from keural.errors import UserError, quoted
from keural.recipe import StageSpec, TrainSpec

SPLIT = ("split", "split-host")
"""Values of `train.precision` that store a weight in two parts; only the training engine computes with them."""
ALONE = ("split-host",)
"""Values of `train.precision` that only one process can have: several have room on their devices."""
SCALE_BLOCK = 256
"""Weights that share a scale of an 8-bit moment, where a row has so many."""
PER_LAYER = ("selective", "budget")
"""Values of `train.recompute` that only the training engine knows."""
MOST_PROCESSES = 1_000_000
RENDEZVOUS = ("RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher tells each of several processes."""
UNEVEN = 17 / 16
"""How much larger than an equal part the largest one may be before a tensor is divided along another dimension."""


class ModelShape(Protocol):
    """What of a network says whether its experts can be divided; a recipe's `model` and a configuration have it."""

    @property
    def num_local_experts(self) -> int: ...  # noqa: D102
    @property
    def hidden_size(self) -> int: ...  # noqa: D102
    @property
    def intermediate_size(self) -> int: ...  # noqa: D102


def processes_started() -> int:
    """How many processes a launcher has started for this run, by its WORLD_SIZE. Raises `UserError` when that is no number, or when
    several have not been told which of them each is.
    """
    stated = os.environ.get("WORLD_SIZE", "1")
    instead = "unset it, or start with python -m keural.launch"
    short = stated.isascii() and stated.isdecimal() and len(stated) <= len(str(MOST_PROCESSES))
    if not (short and 1 <= int(stated) <= MOST_PROCESSES):
        raise UserError(f"WORLD_SIZE {quoted(stated)}: is no number of processes; {instead}")
    if int(stated) > 1 and (missing := [name for name in RENDEZVOUS if not os.environ.get(name)]):
        raise UserError(f"WORLD_SIZE {stated} is set without {', '.join(missing)}: processes cannot meet; {instead}")
    return int(stated)


def why_not_on(stage: StageSpec, processes: int, model: ModelShape) -> str | None:
    """Why a stage of this network cannot run on so many processes; None when it can."""
    if processes > 1 and stage.lora is not None:
        return f"{stage.name}: lora is for one process, and there are {processes}; start one, or leave lora out"
    if processes > 1 and stage.train.precision in ALONE:
        return (
            f"{stage.name}: train.precision {stage.train.precision} is for one process, and there are {processes}; set "
            "train.precision to split, which divides the same state over them, or start one"
        )
    if processes % shards_of(stage.train, processes):
        return (
            f"{stage.name}: train.shard_over {stage.train.shard_over} does not divide the {processes} processes; start a multiple "
            "of it, or leave it out"
        )
    return why_not_divided(stage, shards_of(stage.train, processes), model)


def why_not_divided(stage: StageSpec, shards: int, model: ModelShape) -> str | None:
    """Why the experts cannot be divided as `train.expert_parallel` says over processes that share a copy of the weights."""
    groups = stage.train.expert_parallel
    named = f"{stage.name}: train.expert_parallel {groups}"
    if model.num_local_experts % groups:
        return f"{named} does not divide the model's {model.num_local_experts} experts; give one that does, or 1"
    if shards % groups:
        needed = f"{named} needs a multiple of {groups} processes that share a copy of the weights"
        return f"{needed}, and there {'is' if shards == 1 else 'are'} {shards}; start so many, or give 1"
    shapes = ((1, 2 * model.intermediate_size, model.hidden_size), (1, model.hidden_size, model.intermediate_size))
    if groups > 1 and None in [width_dimension(shape, shards // groups) for shape in shapes]:
        return (
            f"{named} leaves {shards // groups} processes to share each expert, and neither its width {model.intermediate_size} "
            f"nor the model's {model.hidden_size} can be divided by that; start another number of processes, or give 1"
        )
    return None


def width_dimension(shape: Sequence[int], processes: int) -> int | None:
    """The dimension of a tensor of experts along which those processes divide it that have the same experts: the first behind the
    experts' own that they divide evenly; None where there is none.
    """
    return next((dimension for dimension in (1, 2) if shape[dimension] % processes == 0), None)


def shards_of(spec: TrainSpec, processes: int) -> int:
    """Over how many processes a copy of the weights is divided."""
    return min(spec.shard_over or processes, processes)


def by_engine(spec: TrainSpec, accelerator: bool) -> bool:
    """Whether a stage is computed by the training engine: on an accelerator in bfloat16, and wherever only it can do what is asked
    for.
    """
    return (accelerator and spec.compute_dtype == "bfloat16") or only_by_engine(spec)


def only_by_engine(spec: TrainSpec) -> bool:
    """Whether the model's own layers cannot do what is asked for."""
    return spec.precision in SPLIT or spec.recompute in PER_LAYER or spec.expert_parallel > 1


def sharded_dimension(shape: Sequence[int], processes: int) -> int:
    """The dimension along which a tensor is divided: the first, unless that leaves parts that are far from equal and another one
    can be divided evenly.

    Eight experts on 64 processes are the case: along the experts 8 of them would hold everything.
    """
    if largest_part(shape, processes, 0) * processes <= UNEVEN * _product(shape):
        return 0
    return next((dimension for dimension, size in enumerate(shape) if dimension and size % processes == 0), 0)


def largest_part(shape: Sequence[int], processes: int, dimension: int | None = None) -> int:
    """Elements of a tensor that the process with most of them holds; `dimension` is by default the one it is divided along."""
    dimension = sharded_dimension(shape, processes) if dimension is None else dimension
    return _product(shape) // shape[dimension] * -(-shape[dimension] // processes)


def part_of(shape: Sequence[int], index: int, processes: int, dimension: int | None = None) -> tuple[slice, ...]:
    """Where in a tensor the part of the `index`-th of so many processes lies; `dimension` as for `largest_part`."""
    dimension = sharded_dimension(shape, processes) if dimension is None else dimension
    size = -(-shape[dimension] // processes)
    first = min(index * size, shape[dimension])
    regions = [slice(0, whole) for whole in shape]
    regions[dimension] = slice(first, min(first + size, shape[dimension]))
    return tuple(regions)


def share_of(shape: Sequence[int], index: int, processes: int, expert_parallel: int = 1) -> tuple[slice, ...]:
    """Where in a parameter the part of the `index`-th of the processes lies that share a copy of the weights.

    With `expert_parallel` so many neighbours have other experts each, and those in the same place of every such group divide the
    same experts along a width. Experts are the parameters with three dimensions.
    """
    if expert_parallel == 1 or len(shape) != 3:
        return part_of(shape, index, processes)
    group, place = divmod(index, expert_parallel)
    groups = processes // expert_parallel
    own, widths = part_of(shape, place, expert_parallel, 0), part_of(shape, group, groups, width_dimension(shape, groups))
    return (own[0], *widths[1:])


def scale_block(shape: Sequence[int]) -> int:
    """Weights of a tensor that share a scale of an 8-bit moment: `SCALE_BLOCK` of a row, or as many as divide both. So no part of a
    tensor cuts a block, as long as it has whole rows.
    """
    return gcd(SCALE_BLOCK, shape[-1])


def _product(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


ALIGNMENT = 64
PIECE_BYTES = 2**30
"""Logits that exist at a time on an accelerator: 4,096 positions of a vocabulary of 131,074 in bfloat16."""


def padded(vocabulary: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-vocabulary // ALIGNMENT) * ALIGNMENT


def positions_of_a_piece(vocabulary: int, itemsize: int) -> int:
    """Positions whose logits an accelerator makes at a time, a multiple of 128."""
    return max(128, round(PIECE_BYTES / (padded(vocabulary) * itemsize) / 128) * 128)
