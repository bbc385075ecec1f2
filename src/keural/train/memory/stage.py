"""What a stage asks of a GPU: the rows of its steps, its largest micro-batch, and the layout that memory is counted by.

In: a stage and how many GPUs. Out: numbers of tokens, and a `Layout`.
"""

from keural.recipe import OBJECTIVES, StageSpec
from keural.train.memory.activations import Way
from keural.train.memory.parts import Layout
from keural.train.processes.modes import by_engine

ARRIVING = {1: 1.0, 2: 1.4, 4: 1.6, 8: 2.0}
"""By `train.expert_parallel`, the rows that a GPU has room for, over those of even routing: how uneven it is, nobody knows before a
step. In 99 of 100 steps of the laptop recipe's stages the most that any of so many groups got, as a mean over layers, was less:
1.06 to 1.35, 1.27 to 1.51 and 1.45 to 1.92. A router that collapses sends more.
"""


def row_tokens(stage: StageSpec) -> int:
    """Positions of a packed row: two sequences long for pairs."""
    return OBJECTIVES[stage.objective].sequences_per_row * stage.data.sequence_length


def rows_of_a_step(stage: StageSpec) -> int:
    """Packed rows of an optimizer step; for pairs and answers at most so many, as short ones share a row."""
    if stage.train.batch_tokens is not None:
        return stage.train.batch_tokens // row_tokens(stage)
    assert stage.train.batch_records is not None
    return stage.train.batch_records


def share_tokens(stage: StageSpec, gpus: int) -> int:
    """Positions of a step that one GPU computes."""
    return -(-rows_of_a_step(stage) // gpus) * row_tokens(stage)


def micro_batch_tokens(stage: StageSpec, gpus: int) -> int:
    """Positions of the largest micro-batch on one GPU: whole rows, at least one."""
    row, share, limit = row_tokens(stage), share_tokens(stage, gpus), stage.train.micro_batch_tokens
    return share if limit is None else min(share, max(row, limit // row * row))


def layout_of(stage: StageSpec, gpus: int, *, precision: str, recompute: str, compiled: bool | None, tokens: int) -> Layout:
    """The layout of a stage under these settings, whatever it states itself; `compiled` None: where it can be."""
    spec = stage.train
    itemsize = 2 if spec.compute_dtype == "bfloat16" else 4
    engine = by_engine(spec.model_copy(update={"precision": precision, "recompute": recompute}), accelerator=True)
    compiled = (engine and itemsize == 2) if compiled is None else compiled
    converted = gpus == 1 and precision.startswith("fp32") and itemsize == 2
    way = Way(engine, compiled, recompute, itemsize, converted, tokens, spec.expert_parallel, ARRIVING[spec.expert_parallel])
    reference = stage.needs_reference and stage.reference.reference == "online"
    return Layout(gpus, precision, way, reference, spec.shard_over, spec.optimizer)


def own_layout(stage: StageSpec, gpus: int) -> Layout:
    """The layout of a stage as it is."""
    spec = stage.train
    settings = {"precision": spec.precision, "recompute": spec.recompute}
    return layout_of(stage, gpus, **settings, compiled=spec.compile, tokens=micro_batch_tokens(stage, gpus))
