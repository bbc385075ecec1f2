"""Bits per byte of a stage's held-out documents, as a task.

In: a `Bench` and the measures under `evaluation.bits_per_byte`. Out: for each measure the figures of the untrained model, the last
pretraining stage and the final model, with `xz -9` and `zstd -19` beside them.
"""

from collections.abc import Mapping, Sequence

from keural.data.prepared import Prepared, read_heldout_texts
from keural.errors import UserError
from keural.evaluate.bench import Bench, Figures
from keural.evaluate.measures import bits_per_byte
from keural.evaluate.models import UNTRAINED
from keural.evaluate.packers import packed_bits_per_byte
from keural.recipe import OBJECTIVES, BitsPerByteSpec
from keural.terminal import note


def measure(bench: Bench, specs: Sequence[BitsPerByteSpec]) -> Figures:
    """All measures of the recipe, in its order; those of a stage whose data is not here are left out, and it is said."""
    there = [spec for spec in specs if spec.stage in bench.data]
    if left_out := [repr(spec.name) for spec in specs if spec not in there]:
        note(f"bits per byte: {', '.join(left_out)} left out: the data of the stage that is named is not prepared in {bench.out}")
    return {"bits_per_byte": [_measure(bench, spec) for spec in there]} if there else {}


def check(specs: Sequence[BitsPerByteSpec], data: Mapping[str, Prepared]) -> None:
    """Raise `UserError` where there would be no text to measure; stages whose data is not prepared are passed over."""
    for spec in specs:
        if spec.stage in data:
            measured_texts(spec, data[spec.stage])


def _measure(bench: Bench, spec: BitsPerByteSpec) -> Figures:
    texts = measured_texts(spec, bench.data[spec.stage])
    length = bench.recipe.stage(spec.stage).data.sequence_length
    pretrained = [stage.name for stage in bench.recipe.stages if OBJECTIVES[stage.objective].store == "documents"][-1:]
    models = [UNTRAINED, *(name for name in pretrained if name in bench.finished), bench.final]
    figures = (bits_per_byte(bench.model(name), bench.tokenizer, texts, length, spec.overlap) for name in models)
    packed = packed_bits_per_byte(texts)
    return {
        "name": spec.name,
        "language": spec.language,
        "documents": len(texts),
        "bytes": sum(len(text.encode()) for text in texts),
        "models": {name: found["bits_per_byte"] for name, found in zip(models, figures, strict=True)},
        "xz": packed["xz_9"],
        **({"zstd": packed["zstd_19"]} if "zstd_19" in packed else {}),
    }


def measured_texts(spec: BitsPerByteSpec, prepared: Prepared) -> list[str]:
    """The held-out texts of a measure, as many as fit into its `max_bytes`. Raises `UserError` when none does."""
    texts = read_heldout_texts(prepared, spec.language, spec.sources)
    kept = _limited(texts, spec.max_bytes)
    if not kept:
        raise UserError(
            f"evaluation.bits_per_byte {spec.name!r}: the first held-out document has {len(texts[0].encode()):,} bytes, more than "
            f"max_bytes {spec.max_bytes:,}; raise it"
        )
    return kept


def _limited(texts: list[str], max_bytes: int) -> list[str]:
    """The first texts that fit into `max_bytes` of UTF-8."""
    kept, size = [], 0
    for text in texts:
        size += len(text.encode())
        if size > max_bytes:
            break
        kept.append(text)
    return kept
