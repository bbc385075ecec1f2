"""What a stage's settings mean on so many processes: which mode runs where, what computes, how tensors are divided.

In: a stage's settings, the number of processes, shapes. Out: answers that the trainer acts by and `keural plan` counts with. torch
is not needed.
"""

from collections.abc import Sequence
from math import gcd

from keural.recipe import StageSpec, TrainSpec

SPLIT = ("split", "split-host")
"""Values of `train.precision` that store a weight in two parts; only the training engine computes with them."""
ALONE = ("split-host",)
"""Values of `train.precision` that only one process can have: several have room on their devices."""
SCALE_BLOCK = 256
"""Weights that share a scale of an 8-bit moment, where a row has so many."""
PER_LAYER = ("selective", "budget")
"""Values of `train.recompute` that only the training engine knows."""
UNEVEN = 17 / 16
"""How much larger than an equal part the largest one may be before a tensor is divided along another dimension."""


def why_not_on(stage: StageSpec, processes: int) -> str | None:
    """Why a stage cannot run on so many processes; None when it can."""
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
    return None


def shards_of(spec: TrainSpec, processes: int) -> int:
    """Over how many processes a copy of the weights is divided."""
    return min(spec.shard_over or processes, processes)


def by_engine(spec: TrainSpec, accelerator: bool) -> bool:
    """Whether a stage is computed by the training engine: on an accelerator in bfloat16, and wherever only it can do what is asked
    for.
    """
    return (accelerator and spec.compute_dtype == "bfloat16") or spec.precision in SPLIT or spec.recompute in PER_LAYER


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
