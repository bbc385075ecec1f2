"""`checks.json`: what was looked for before step 0, and what was found; checks that passed are not repeated for the same data."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from keural.data.loading.stream import Stream
from keural.files import CheckedFile, fingerprint
from keural.model import KeuralConfig
from keural.recipe import OBJECTIVES, StageSpec
from keural.train.checks.labels import balance_line, label_balance
from keural.train.checks.probes import check_isolation, check_references, check_router
from keural.train.checks.stores import CHECKS, TRAINING, Finding, LengthBias, check_store, length_bias
from keural.train.trainer import Trainer

CHECKS_FILE = "checks.json"


class ChecksFile(CheckedFile):
    """What a stage was checked for before its first step."""

    fingerprint: str
    """Of the data and of what is allowed."""
    findings: list[dict[str, Any]]
    """`keural.train.checks.stores.Finding`s."""
    lengths: list[dict[str, Any]]
    """`keural.train.checks.stores.LengthBias` of pairs."""
    labels: dict[str, Any] | None = None
    """`keural.train.checks.labels.LabelBalance` of labelled answers."""
    isolation: float | None = None
    """Of a document's dependence on itself, how much it depends on its neighbour in a packed row; None: not measured."""
    reference_difference: float | None = None
    """Mean difference per token between policy and reference before step 0; None where there is no reference."""


def check_data(
    path: Path | None, stage: StageSpec, config: KeuralConfig, streams: dict[str, Stream]
) -> tuple[ChecksFile, list[str]]:
    """Check the stage's stores and its router, unless `path` says that it was done; what was found, which is kept there (None:
    nowhere), and lines that say so.

    `streams` are those of the stage by what messages call them, `TRAINING` among them. Raises `UserError` as the checks do.
    """
    check_router(stage.router, config)
    end_id = config.eos_token_id
    assert isinstance(end_id, int)
    weights = [stage.kto.desirable_weight, stage.kto.undesirable_weight] if OBJECTIVES[stage.objective].store == "answers" else []
    data = {name: stream.fingerprint for name, stream in streams.items()}
    wanted = fingerprint([data, stage.checks.model_dump(), end_id, *weights])
    known = ChecksFile.find(path) if path else None
    if known is not None and known.fingerprint == wanted:
        return known, []
    findings = [each for name, stream in streams.items() for each in check_store(stream, stage.checks, end_id, name)]
    lengths = [each for name, stream in streams.items() for each in length_bias(stream, name)]
    balance = label_balance(streams[TRAINING], stage.kto)
    made = ChecksFile(
        fingerprint=wanted,
        findings=[asdict(each) for each in findings],
        lengths=[asdict(each) for each in lengths],
        labels=None if balance is None else asdict(balance),
    )
    if path:
        made.write(path)
    lines = [_line(each) for each in findings if each.count and each.check != "one_label"]
    lines += [_length_line(each) for each in lengths if not each.source]
    return made, lines + ([f"{TRAINING} data: {balance_line(balance, stage.kto)}"] if balance is not None else [])


def probe(path: Path, data: ChecksFile, trainer: Trainer) -> ChecksFile:
    """Check the forward passes of a stage before its first step, and keep the figures in `path`. Every rank must call it."""
    isolation, difference = check_isolation(trainer), check_references(trainer)
    made = data.model_copy(update={"isolation": isolation, "reference_difference": difference})
    trainer.ranks.on_main(lambda: made.write(path))
    return made


def _line(found: Finding) -> str:
    return f"{found.store} data: {found.share:.2%} {CHECKS[found.check].what} ({found.count:,} of {found.looked_at:,})"


def _length_line(found: LengthBias) -> str:
    which = "longer" if found.longer >= 0.5 else "shorter"
    return (
        f"{found.store} data: by length alone (the {which} answer) {found.accuracy:.1%} of the pairs are ranked right; chosen "
        f"answers have {found.chosen_tokens:.0f} tokens on average, rejected ones {found.rejected_tokens:.0f}"
    )
