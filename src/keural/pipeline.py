"""The pipeline: a recipe's stages in order, each from directories to directories.

`run` prepares the tokenizer and every stage's data, trains the stages, evaluates, and writes `summary.json` and `report.html`.
Each part has a fingerprint of everything that determines its result: a finished part with the same fingerprint is skipped, an
interrupted stage is resumed, a part whose settings changed is set aside (never overwritten) and made again.

    runs/<recipe>/  recipe.yaml  tokenizer/  data/<fingerprint>/{train,heldout}  <stage>/{checkpoints,model}  final -> <stage>/model
"""

import contextlib
import fcntl
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from keural.convert.hf import save_model_directory
from keural.convert.lineage import check_sums
from keural.data.decontaminate import check_evaluation
from keural.data.prepare import Prepared, check_cleaning, check_sources, find_prepared, iter_texts, prepare, used_sources
from keural.data.ready import check_ready, ready
from keural.data.sources import FileHashes, content_of
from keural.data.stream import Stream
from keural.errors import UserError
from keural.files import fingerprint, read_json, write_atomic, write_json
from keural.model import KeuralConfig
from keural.recipe import Recipe, StageSpec, parse_duration
from keural.report.html import write_report
from keural.scorecard import measured_texts, score
from keural.tokenizer import KeuralTokenizer
from keural.tokenizer.train import train_tokenizer
from keural.train import parallel
from keural.train.stage import StageJob, StageResult, train_stage

NOT_IN_FINGERPRINT: Any = {"notes": True, "train": {"save_every", "keep_checkpoints", "evaluate_every"}}


@dataclass(frozen=True)
class Outcome:
    """What a run came to: its directory, and whether a signal stopped it before the end."""

    directory: Path
    interrupted: bool


@dataclass(frozen=True)
class Workspace:
    """A recipe, its run directory, its tokenizer, and where each stage's data is."""

    recipe: Recipe
    out: Path
    tokenizer: KeuralTokenizer
    data: dict[str, Prepared]

    @property
    def model_config(self) -> KeuralConfig:
        """The network of the recipe, with the tokenizer's vocabulary."""
        return build_config(self.recipe, self.tokenizer)

    def stage_fingerprint(self, stage: StageSpec) -> str:
        """Of everything that determines the stage's weights: its settings, its data, and the model it starts from."""
        return fingerprint(
            {
                "stage": stage.model_dump(exclude=NOT_IN_FINGERPRINT),
                "model": self.recipe.spec.model.model_dump(),
                "seed": self.recipe.spec.seed,
                "budget": self.recipe.spec.budget if stage.train.budget_share else None,
                "tokenizer": self.tokenizer.sha256,
                "data": self.data[stage.name].fingerprint,
                "init": self.init_fingerprint(stage),
            }
        )

    def init_fingerprint(self, stage: StageSpec) -> str:
        """Of the weights a stage starts from."""
        if stage.init_from == "random":
            return "random"
        if stage.starts_from_directory:
            lineage = init_directory(self.out, stage) / "keural.json"
            files = _mapping(lineage).get("files")
            if not isinstance(files, dict):
                raise UserError(f"{lineage}: names no files; give a model directory that this package has written")
            return fingerprint(sorted(files.items()))
        return self.stage_fingerprint(self.recipe.stage(stage.init_from))


def build_config(recipe: Recipe, tokenizer: KeuralTokenizer) -> KeuralConfig:
    """The model configuration of a recipe with this tokenizer's ids."""
    shape = recipe.spec.model.model_dump()
    theta = shape.pop("rope_theta")
    return KeuralConfig(
        **shape,
        vocab_size=tokenizer.vocab_size,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.im_end_id,
    )


def run(recipe: Recipe, out: Path, *, until: str | None = None, only: str | None = None, tensorboard: bool = False) -> Outcome:
    """Run a recipe's stages in order into `out`; finished parts are skipped, an interrupted stage is resumed.

    `until` stops after that stage, `only` runs just that stage (the one it starts from must be finished). Under torchrun
    every rank calls this; rank 0 prepares and exports. Raises `UserError` for anything the user can mend, before the first
    step where possible.
    """
    stages = _selected(recipe, until, only)
    with parallel.session() as ranks, contextlib.ExitStack() as stack:
        started = time.monotonic()
        ranks.on_main(lambda: check_inputs(recipe, stages, out))
        ranks.on_main(lambda: stack.enter_context(_only_run_in(out)))
        ranks.on_main(lambda: _open_run(recipe, stages, out))
        workspace = prepare_all(recipe, stages, out)
        for stage in stages:
            if _train(workspace, stage, ranks, tensorboard):
                return Outcome(out, interrupted=True)
        ranks.on_main(lambda: _finish(workspace, started))
    return Outcome(out, interrupted=False)


@contextlib.contextmanager
def _only_run_in(out: Path) -> Iterator[None]:
    """Refuse a second run in the same directory: the two would delete each other's files. The lock goes with the process."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("wb")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another run directory") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{out}: another run is at work there; wait for it, or give another --out") from error
        except OSError:  # a file system without locks
            pass
        yield


def _open_run(recipe: Recipe, stages: list[StageSpec], out: Path) -> None:
    """Keep the resolved recipe, prepare the data: once, before other ranks open it."""
    write_atomic(out / "recipe.yaml", yaml.safe_dump(recipe.resolved(), allow_unicode=True, sort_keys=False))
    workspace = prepare_all(recipe, stages, out)
    for measure in recipe.spec.evaluation.bits_per_byte:
        if measure.stage in workspace.data:
            measured_texts(measure, workspace.data[measure.stage])


def _selected(recipe: Recipe, until: str | None, only: str | None) -> list[StageSpec]:
    if only is not None:
        return [recipe.stage(only)]
    last = recipe.stages.index(recipe.stage(until)) if until is not None else len(recipe.stages) - 1
    return list(recipe.stages[: last + 1])


def check_inputs(recipe: Recipe, stages: Iterable[StageSpec], out: Path) -> None:
    """Refuse what cannot work before anything is written: unknown adapters, missing paths, a model directory that is none."""
    sources = [source for stage in stages for source in used_sources(stage.data)]
    check_sources([*recipe.spec.tokenizer.sources, *sources], data_directory(recipe))
    for stage in stages:
        check_evaluation(stage.data.decontaminate, data_directory(recipe))
        check_cleaning(stage.data, data_directory(recipe))
        check_ready(stage.data, data_directory(recipe))
        if stage.starts_from_directory and not (init_directory(out, stage) / "config.json").is_file():
            raise UserError(f"{stage.name}: init_from {stage.init_from!r} is not a model directory (no config.json there)")


def data_directory(recipe: Recipe) -> Path | None:
    """The directory that sources' paths are relative to, where the recipe gives one."""
    if recipe.spec.data is None:
        return None
    path = Path(recipe.spec.data).expanduser()
    if not path.is_dir():
        raise UserError(f"data={recipe.spec.data}: no such directory; give the directory with the unpacked data sets")
    return path


def init_directory(out: Path, stage: StageSpec) -> Path:
    """The model directory a stage starts from: another stage's, or the one it names."""
    return Path(stage.init_from).expanduser() if stage.starts_from_directory else out / stage.init_from / "model"


def prepare_all(recipe: Recipe, stages: Iterable[StageSpec], out: Path) -> Workspace:
    """Tokenizer and token stores of the given stages and of those they start from; what is already there is only opened."""
    tokenizer = prepare_tokenizer(recipe, out)
    needed = {name: stage for stage in stages for name, stage in _with_ancestors(recipe, stage).items()}
    data = {name: _prepare_stage(recipe, stage, tokenizer, out) for name, stage in needed.items()}
    return Workspace(recipe, out, tokenizer, data)


def _with_ancestors(recipe: Recipe, stage: StageSpec) -> dict[str, StageSpec]:
    chain = {stage.name: stage}
    while stage.predecessor is not None:
        stage = recipe.stage(stage.predecessor)
        chain[stage.name] = stage
    return chain


def _prepare_stage(recipe: Recipe, stage: StageSpec, tokenizer: KeuralTokenizer, out: Path) -> Prepared:
    directory = data_directory(recipe)
    if stage.data.ready:
        return ready(stage.data, stage.objective, directory, tokenizer, out / "data")
    return prepare(stage.data, stage.objective, directory, tokenizer, out / "data", recipe.spec.seed)


def find_stage_data(recipe: Recipe, stage: StageSpec, out: Path) -> Prepared | None:
    """A stage's data if it is there in `out` (or ready), made from the sources as they are now; nothing is written but hashes."""
    if not stage.data.ready and not (out / "data").is_dir():
        return None
    path = recipe.spec.tokenizer.path
    directory = out / "tokenizer" if path is None else (data_directory(recipe) or Path()) / path
    if not directory.exists():
        return None
    tokenizer = KeuralTokenizer.load(directory)
    if stage.data.ready:
        return _prepare_stage(recipe, stage, tokenizer, out)
    arguments = (stage.data, stage.objective, data_directory(recipe), tokenizer, out / "data", recipe.spec.seed)
    return find_prepared(*arguments)


def prepare_tokenizer(recipe: Recipe, out: Path) -> KeuralTokenizer:
    """Load the recipe's tokenizer, or train it into `out/tokenizer` when it is not there yet."""
    spec, directory = recipe.spec.tokenizer, out / "tokenizer"
    if spec.path:
        return KeuralTokenizer.load((data_directory(recipe) or Path()) / spec.path)
    wanted = _tokenizer_fingerprint(recipe, out)
    marker = directory / "done.json"
    if is_done(directory, wanted):
        tokenizer = KeuralTokenizer.load(directory)
        if tokenizer.sha256 != _mapping(marker).get("sha256"):
            raise UserError(f"{directory / 'tokenizer.model'}: damaged (its checksum differs); delete {directory} and run again")
        return tokenizer
    set_aside(directory)
    texts = iter_texts(spec.sources, data_directory(recipe), spec.max_bytes, recipe.spec.seed)
    tokenizer = train_tokenizer(texts, spec, directory, recipe.spec.seed)
    write_json(marker, {"fingerprint": wanted, "sha256": tokenizer.sha256})
    return tokenizer


def _tokenizer_fingerprint(recipe: Recipe, out: Path) -> str:
    """Of everything that determines a trained tokenizer: its settings and the contents of its sources."""
    spec, cache = recipe.spec.tokenizer, out / "data" / "file-hashes.json"
    hashes = FileHashes(_mapping(cache) if cache.is_file() else None)
    contents = [content_of(source, data_directory(recipe), hashes) for source in spec.sources]
    if hashes.changed:
        write_json(cache, hashes.known)
    return fingerprint({"spec": spec.model_dump(), "seed": recipe.spec.seed, "contents": contents})


def set_aside(directory: Path) -> None:
    """Keep an outdated directory under another name instead of overwriting it."""
    if directory.exists():
        number = next(n for n in range(1, 10_000) if not directory.with_name(f"{directory.name}.old-{n}").exists())
        directory.rename(directory.with_name(f"{directory.name}.old-{number}"))


def _train(workspace: Workspace, stage: StageSpec, ranks: parallel.Ranks, tensorboard: bool) -> bool:
    """Bring one stage to its end unless it is there already; True when a signal stopped it."""
    directory, wanted = workspace.out / stage.name, workspace.stage_fingerprint(stage)
    if is_done(directory, wanted):
        ranks.say(f"{stage.name}: finished already, skipped")
        return False
    for row in workspace.data[stage.name].table:
        if "survey" in row:
            ranks.say(f"{stage.name}: {row['survey']}")
    ranks.on_main(lambda: _check_ready(workspace, stage))
    ranks.on_main(lambda: _open_stage_directory(directory, stage, wanted))
    result = train_stage(_job(workspace, stage, wanted, tensorboard), ranks)
    if not result.interrupted:
        export_stage(workspace, stage, result, wanted, ranks)
    return result.interrupted


def is_done(directory: Path, wanted: str) -> bool:
    """Whether a stage directory holds the finished result of exactly these settings."""
    marker = directory / "done.json"
    return marker.is_file() and _fingerprint_in(marker) == wanted


def _fingerprint_in(marker: Path) -> str:
    found = _mapping(marker).get("fingerprint")
    if not isinstance(found, str):
        raise UserError(f"{marker}: damaged (it has no fingerprint); delete it and run the same command again")
    return found


def _mapping(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged (not a mapping); delete it and run the same command again")
    return value


def _check_ready(workspace: Workspace, stage: StageSpec) -> None:
    """Refuse to start from a stage that is not finished, or from weights that are not those that were saved."""
    if stage.init_from == "random":
        return
    if stage.predecessor is not None:
        before = workspace.recipe.stage(stage.predecessor)
        if not is_done(workspace.out / before.name, workspace.stage_fingerprint(before)):
            raise UserError(
                f"{stage.name}: starts from {before.name}, which is not finished in {workspace.out}; run that stage first"
            )
    check_sums(init_directory(workspace.out, stage))


def _open_stage_directory(directory: Path, stage: StageSpec, wanted: str) -> None:
    marker = directory / "stage.json"
    if directory.exists() and not (marker.is_file() and _fingerprint_in(marker) == wanted):
        set_aside(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_atomic(directory / "stage.yaml", yaml.safe_dump(stage.model_dump(), allow_unicode=True, sort_keys=False))
    write_json(marker, {"fingerprint": wanted})


def open_stream(workspace: Workspace, stage: StageSpec) -> Stream:
    """The stream of batches that a stage trains on."""
    length, train, tokenizer = stage.data.sequence_length, stage.train, workspace.tokenizer
    rows = None if train.batch_tokens is None else train.batch_tokens // length
    settings = (stage.objective, length, rows, train.batch_pairs, workspace.recipe.spec.seed)
    return workspace.data[stage.name].corpus.stream(*settings, tokenizer.sha256, tokenizer.vocab_size)


def _job(workspace: Workspace, stage: StageSpec, wanted: str, tensorboard: bool) -> StageJob:
    budget, share = workspace.recipe.spec.budget, stage.train.budget_share
    prepared = workspace.data[stage.name]
    return StageJob(
        stage=stage,
        seed=workspace.recipe.spec.seed,
        model_config=workspace.model_config,
        init=None if stage.init_from == "random" else init_directory(workspace.out, stage),
        train_store=prepared.corpus,
        heldout_store=prepared.heldout,
        tokenizer_sha=workspace.tokenizer.sha256,
        run_dir=workspace.out / stage.name,
        fingerprint=wanted,
        budget_seconds=parse_duration(budget) * share if budget and share else None,
        tensorboard=tensorboard,
    )


def export_stage(workspace: Workspace, stage: StageSpec, result: StageResult, wanted: str, ranks: parallel.Ranks) -> None:
    """Write the stage's model directory, then the marker that it is done."""
    weights = parallel.full_state_dict(result.model)
    ranks.on_main(lambda: _save_stage(workspace, stage, result, weights or {}, wanted))


def _save_stage(workspace: Workspace, stage: StageSpec, result: StageResult, weights: dict[str, Tensor], wanted: str) -> None:
    directory, spec = workspace.out / stage.name, workspace.recipe.spec
    chain = list(reversed(_with_ancestors(workspace.recipe, stage)))
    lineage = {"recipe": spec.name, "stage": stage.name, "fingerprint": wanted, "chain": chain}
    save_model_directory(directory / "model", workspace.model_config, weights, workspace.tokenizer, lineage, spec.chat)
    done = {"name": stage.name, "objective": stage.objective, "init_from": stage.init_from, "fingerprint": wanted}
    done["init"] = workspace.init_fingerprint(stage)
    measured = ("seconds", "tokens", "steps", "loss_first", "loss_last", "heldout")
    write_json(directory / "done.json", done | {name: getattr(result, name) for name in measured})


def _finish(workspace: Workspace, started: float) -> None:
    """Link the last finished stage's model, evaluate it when the recipe is complete, and write the summary and the report.

    Stages that this run left alone (`until`, `only`) count, too, unless the stage they start from has been made again.
    """
    out, recipe = workspace.out, workspace.recipe
    stages = [stage for stage in recipe.stages if _is_current(workspace, stage)]
    _link_final(out, stages[-1].name)
    complete = len(stages) == len(recipe.stages)
    if complete and workspace.data.keys() != {stage.name for stage in stages}:
        workspace = prepare_all(recipe, stages, out)
        complete = all(is_done(out / stage.name, workspace.stage_fingerprint(stage)) for stage in stages)
    summary: dict[str, Any] = {
        "recipe": recipe.spec.name,
        "seconds": 0.0,
        "stages": [read_json(out / stage.name / "done.json") for stage in stages],
        "data": {stage.name: workspace.data[stage.name].table for stage in stages if stage.name in workspace.data},
        "evaluation": {},
        "samples": [],
    }
    if complete:
        summary |= _evaluated(workspace)
    summary["seconds"] = round(time.monotonic() - started, 3)
    write_json(out / "summary.json", summary)
    write_report(out)


def _is_current(workspace: Workspace, stage: StageSpec) -> bool:
    """Whether a stage is finished, and from what its predecessor is now."""
    directory = workspace.out / stage.name
    if stage.name in workspace.data:
        return is_done(directory, workspace.stage_fingerprint(stage))
    marker = directory / "done.json"
    if not marker.is_file():
        return False
    if stage.predecessor is None:
        return _mapping(marker).get("init") == workspace.init_fingerprint(stage)
    before = workspace.recipe.stage(stage.predecessor)
    made_from = _mapping(marker).get("init")
    return _is_current(workspace, before) and made_from == _fingerprint_in(workspace.out / before.name / "done.json")


def _link_final(out: Path, stage_name: str) -> None:
    link = out / "final"
    temporary = out / ".final.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(Path(stage_name) / "model", target_is_directory=True)
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)
    temporary.replace(link)


def _evaluated(workspace: Workspace) -> dict[str, Any]:
    """Evaluation and sample answers of the finished recipe, reused when nothing they depend on has changed."""
    cache = workspace.out / "evaluation.json"
    wanted = fingerprint(
        {
            "evaluation": workspace.recipe.spec.evaluation.model_dump(),
            "chat": workspace.recipe.spec.chat.model_dump(),
            "stages": [workspace.stage_fingerprint(stage) for stage in workspace.recipe.stages],
        }
    )
    if cache.is_file() and _fingerprint_in(cache) == wanted:
        return dict(read_json(cache)["result"])
    result = score(workspace.recipe, workspace.out, workspace.tokenizer, workspace.model_config, workspace.data)
    write_json(cache, {"fingerprint": wanted, "result": result})
    return result
