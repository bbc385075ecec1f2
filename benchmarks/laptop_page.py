"""The page of a run of the laptop recipe, or of what extends it, from its run directories: one for each seed.

    python benchmarks/laptop_page.py RUN [RUN ...] > benchmarks/laptop_2-core-cpu_DATE.md

In: finished run directories of one recipe. Out, as Markdown: bits per byte of every measured text, the stages, the loss on held-out
answers of every source before and after each SFT stage with the standard error of its change over conversations, each against
itself (measured here, by the models that the stage starts from and ends with), held-out pairs ranked right with Wilson's interval
beside what length alone gives, and every sample answer, none chosen. Of several runs the mean and its standard error, and each
run's value where there are too few for one.
"""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.stages_sweep import Losses, changes, losses
from keural.errors import UserError
from keural.evaluate.statistics.intervals import wilson
from keural.model import KeuralConfig
from keural.pipeline.run_contents import read_run
from keural.pipeline.run_directory import MODEL, TOKENIZER
from keural.recipe import StageSpec
from keural.report.collect import Run, Stage
from keural.tokenizer import KeuralTokenizer
from keural.train.objectives.registry import LOSSES
from keural.train.processes.ranks import Ranks
from keural.train.stage.building import computing_policy, stream_of
from keural.train.stage.job import StageJob
from keural.train.trainer import Trainer


def page(runs: Sequence[Run]) -> Iterator[str]:
    """All tables, one after the other."""
    for part in (bits, stages, answers, pairs, samples):
        yield from part(runs)
        yield ""


def bits(runs: Sequence[Run]) -> Iterator[str]:
    """Bits per byte of every measured text: untrained, after pretraining, after all stages, and packed."""
    yield "Bits per byte of held-out text:\n"
    yield from _head("text", "untrained", "after pretraining", "after all stages", "difference", "`xz -9`")
    for measures in zip(*(run.evaluation["bits_per_byte"] for run in runs), strict=True):
        untrained, pretrained, final = zip(*(each["models"].values() for each in measures), strict=True)
        cost = [after - before for before, after in zip(pretrained, final, strict=True)]
        first = measures[0]
        figures = [_mean(untrained), f"**{_mean(pretrained)}**", f"**{_mean(final)}**", _mean(cost, "+.3f"), f"{first['xz']:.3f}"]
        yield _row(f"{first['name']} ({first['bytes']:,} bytes)", *figures)


def stages(runs: Sequence[Run]) -> Iterator[str]:
    """What each stage did in which time."""
    yield "Stages:\n"
    yield from _head("stage", "steps", "tokens", "s", "held-out loss")
    for each in _by_stage(runs):
        done = [stage.done for stage in each]
        counts = [_mean([value[key] for value in done], ",.0f") for key in ("steps", "tokens", "seconds")]
        yield _row(each[0].name, *counts, _mean([value["heldout"]["loss"] for value in done]))


def answers(runs: Sequence[Run]) -> Iterator[str]:
    """The loss on held-out answers by source, before and after each SFT stage."""
    yield "Loss on held-out answers by source (nats per token), before and after each stage that trains on them; its change with"
    yield "the standard error over conversations:\n"
    yield from _head("stage", "source", "conversations", "before", "after", "change")
    for each in _by_stage(runs):
        if each[0].done["objective"] != "sft":
            continue
        found = [_changes(run, stage) for run, stage in zip(runs, each, strict=True)]
        for source, first in found[0].items():
            values = [one[source] for one in found]
            told = " / ".join(f"{value['after'] - value['before']:+.3f} ± {value['error']:.3f}" for value in values)
            before, after = (_mean([value[key] for value in values]) for key in ("before", "after"))
            yield _row(each[0].name, source, str(first["conversations"]), before, after, told)


def pairs(runs: Sequence[Run]) -> Iterator[str]:
    """Held-out pairs that are ranked right, with what length alone gives."""
    yield "Held-out pairs ranked right, with Wilson's 95% interval, a value for each run; and by length alone:\n"
    yield from _head("stage", "pairs", "n", "ranked right", "by length alone")
    for each in _by_stage(runs):
        if each[0].done["objective"] != "dpo":
            continue
        lengths = {found["source"]: found for found in each[0].checks["lengths"] if found["store"] == "held-out"}
        for source, name in [("", "reward_accuracy"), *_sources(each[0], "reward_accuracy")]:
            count = round(each[0].done["heldout"][f"source/{source}/items" if source else "items"])
            shares = [wilson(stage.done["heldout"][name] * count, count) for stage in each]
            told = "; ".join(f"{share.value:.3f} ({share.low:.3f}–{share.high:.3f})" for share in shares)
            longer = lengths[source]["longer"] if source in lengths else lengths[""]["longer"]
            yield _row(each[0].name, source or "all", str(count), told, f"{max(longer, 1 - longer):.3f}")


def samples(runs: Sequence[Run]) -> Iterator[str]:
    """Every answer to the recipe's sample prompts."""
    yield "Answers to the recipe's sample prompts, greedy, at most 64 tokens, all of them:\n"
    yield from _head("prompt", *(f"seed {run.recipe.get('seed')}" for run in runs))
    for each in zip(*(run.summary["samples"] for run in runs), strict=True):
        yield _row(_cell(each[0]["prompt"]), *(_cell(sample["answer"]) for sample in each))


def _by_stage(runs: Sequence[Run]) -> Iterator[tuple[Stage, ...]]:
    yield from zip(*(run.stages for run in runs), strict=True)


def _sources(stage: Stage, figure: str) -> list[tuple[str, str]]:
    """Name of each source with a held-out figure of its own, and the figure's name."""
    parts = [(key.split("/"), key) for key in stage.done["heldout"] if key.startswith("source/")]
    return [(names[1], key) for names, key in parts if names[2] == figure]


def _changes(run: Run, stage: Stage) -> dict[str, dict[str, float]]:
    """How the loss on the stage's held-out answers changes, by source."""
    starts = (run.directory / stage.done["init_from"], run.directory / stage.name)
    before, after = (_losses(run, stage, start / MODEL) for start in starts)
    return changes(before, after)


def _losses(run: Run, stage: Stage, start: Path) -> Losses:
    """Losses on the stage's held-out answers of a model."""
    store = run.directory / stage.done["data"][0]
    spec = StageSpec.model_validate(
        {
            "name": stage.name,
            "objective": "sft",
            "data": {"store": str(store), "sequence_length": stage.settings["data"]["sequence_length"]},
            "train": {"steps": 1, "lr": 1.0, "batch_tokens": stage.settings["train"]["batch_tokens"]},
        }
    )
    tokenizer = KeuralTokenizer.load(run.directory / TOKENIZER)
    job = StageJob(
        stage=spec, seed=0, model_config=KeuralConfig.from_pretrained(start), init=start, train_store=store,
        heldout_store=None, tokenizer_sha=tokenizer.sha256, run_dir=run.directory, fingerprint="",
    )  # fmt: skip
    ranks, objective = Ranks(0, 1, torch.device("cpu")), LOSSES[spec.objective](spec)
    policy = computing_policy(job, objective.uniform, ranks).eval()
    stream = stream_of(job, store.parent / "heldout", ranks)
    return losses(Trainer(spec, policy, _none(policy), objective, stream, ranks, lambda step: 0.0), stream)


def _none(policy: torch.nn.Module) -> Any:
    """An optimizer that is never asked for a step."""
    return torch.optim.SGD(policy.parameters())


def _mean(values: Sequence[float], form: str = ".3f") -> str:
    """One value, two values, or the mean of more with its standard error."""
    if len(values) < 3:
        return " / ".join(f"{value:{form}}" for value in values)
    return f"{statistics.fmean(values):{form}} ± {statistics.stdev(values) / len(values) ** 0.5:{form.lstrip('+')}}"


def _head(*names: str) -> Iterator[str]:
    yield _row(*names)
    yield _row(*("---" for _ in names))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """A text as a cell of a table: whole, its line ends shown."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ⏎ ") or "(nothing)"


def main() -> None:
    """Print the page of the runs that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    runs = [read_run(path) for path in parser.parse_args().runs]
    if unfinished := [run for run in runs if not run.evaluation or not run.summary.get("samples")]:
        raise UserError(f"{unfinished[0].directory}: is not finished: it has no evaluation, or no sample answers")
    if len({tuple(stage.name for stage in run.stages) for run in runs}) > 1:
        raise UserError("these runs have other stages; a page is of one recipe")
    print("\n".join(page(runs)))


if __name__ == "__main__":
    main()
