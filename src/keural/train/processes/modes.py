"""What a stage's settings mean on so many processes: which mode runs where, what computes, how tensors are divided.

In: a stage's settings, the number of processes, shapes. Out: answers that the trainer acts by and `keural plan` counts with. torch
is not needed.
"""

from collections.abc import Sequence

from keural.recipe import StageSpec, TrainSpec

ALONE = {"precision": ("split", "split-host"), "recompute": ("selective",)}
"""Values of keys of `train` that only one process can have."""
INSTEAD = {"precision": "fp32", "recompute": "full"}
"""What many processes can have instead."""
UNEVEN = 17 / 16
"""How much larger than an equal part the largest one may be before a tensor is divided along another dimension."""


def why_not_on(stage: StageSpec, processes: int) -> str | None:
    """Why a stage cannot run on so many processes; None when it can."""
    if processes > 1 and stage.lora is not None:
        return f"{stage.name}: lora is for one process, and there are {processes}; start one, or leave lora out"
    for key, values in ALONE.items():
        value = getattr(stage.train, key)
        if processes > 1 and value in values:
            return (
                f"{stage.name}: train.{key} {value} is for one process, and there are {processes}; start one, or set train.{key} "
                f"to {INSTEAD[key]}"
            )
    return None


def by_engine(spec: TrainSpec, processes: int, accelerator: bool) -> bool:
    """Whether a stage is computed by the training engine: on an accelerator in bfloat16, and wherever only it can do what is asked
    for. Sharded over several processes it is not.
    """
    if processes > 1:
        return False
    return (accelerator and spec.compute_dtype == "bfloat16") or spec.precision != "fp32" or spec.recompute == "selective"


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
