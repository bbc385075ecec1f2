"""What a recipe's stages work on: tokenizer, data, and the models they start from."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from keural.data.filtering.decontamination import check_evaluation
from keural.data.loading.epoch_order import ORDER_VERSION
from keural.data.loading.stream import Stream
from keural.data.prepare import UnusableSources, check_cleaning, prepare
from keural.data.prepared import HASHES, Prepared, find_by_settings, find_prepared
from keural.data.pretokenized import check_pretokenized, open_pretokenized
from keural.data.sources import Source, lacks_directory, open_sources
from keural.data.stage_sources import open_stage_sources
from keural.data.tokenizer_texts import iter_texts
from keural.errors import UserError, UserErrors, for_all
from keural.files import FileHashes, atomic_directory, fingerprint, sha256_file
from keural.pipeline.run_directory import (
    DATA,
    DONE,
    MODEL,
    TOKENIZER,
    Settings,
    TokenizerMarker,
    changes,
    claim,
    is_run_directory,
    set_aside,
    tokenizer_files,
)
from keural.pretrained.lineage import LINEAGE, read_record
from keural.pretrained.location import check_kind, model_directory
from keural.recipe import OBJECTIVES, VERSION, DataSpec, Recipe, StageSpec
from keural.terminal import say, work_progress
from keural.tokenizer import KeuralTokenizer
from keural.tokenizer.train import train_tokenizer
from keural.train.processes.modes import processes_started, why_not_on

if TYPE_CHECKING:
    from keural.model import KeuralConfig


@dataclass(frozen=True)
class Workspace:
    """A recipe, its run directory, its tokenizer, and where each stage's data is."""

    recipe: Recipe
    out: Path
    tokenizer: KeuralTokenizer
    data: dict[str, Prepared]

    @property
    def model_config(self) -> "KeuralConfig":
        """The network of the recipe, with the tokenizer's vocabulary."""
        return build_config(self.recipe, self.tokenizer)

    def stage_settings(self, stage: StageSpec, length: bool = True) -> Settings:
        """Everything that determines the stage's weights: its settings, its data, and the model it starts from.

        Without `length` everything that determines each step, but not how many there are.
        """
        budget = {"budget": self.recipe.spec.budget} if length and stage.train.budget_share is not None else {}
        return {
            "version": VERSION,
            "stage": stage.determining("weights", length),
            "model": self.recipe.spec.model.determining("weights"),
            "seed": self.seed(stage),
            **({"order": ORDER_VERSION} if OBJECTIVES[stage.objective].unit != "tokens" else {}),
            **budget,
            "tokenizer": self.tokenizer.sha256,
            "data": self.data[stage.name].fingerprint,
            "init": self.init_fingerprint(stage),
        }

    def stage_fingerprint(self, stage: StageSpec) -> str:
        """Of everything that determines the stage's weights."""
        return fingerprint(self.stage_settings(stage))

    def seed(self, stage: StageSpec) -> int:
        """Of all that is drawn in a stage: the recipe's, and another one for a stage that reads a source that one before it reads.

        In the same order it would begin with what that one has read, and a budget that ends within the data would never come to
        the rest. So it would with a source more: a shuffle of somewhat more instances begins as that of fewer does.
        """
        read, name = 0, stage.predecessor
        while name is not None:
            before = self.recipe.stage(name)
            read += before.objective == stage.objective and _shares(before.data, stage.data)
            name = before.predecessor
        return self.orders[read]

    @cached_property
    def orders(self) -> tuple[int, ...]:
        """The seed of a stage by how many before it have read its data."""
        seed = self.recipe.spec.seed
        others = (int(fingerprint({"seed": seed, "read": read})[:8], 16) for read in range(1, len(self.recipe.stages)))
        return (seed, *others)

    def init_fingerprint(self, stage: StageSpec) -> str:
        """Of the weights a stage starts from."""
        if stage.init_from == "random":
            return "random"
        if stage.starts_from_directory:
            return fingerprint(sorted(_record_files(init_directory(self.out, stage)).items()))
        return self.stage_fingerprint(self.recipe.stage(stage.init_from))


def _shares(first: DataSpec, second: DataSpec) -> bool:
    """Whether both read the same data, or a source in rows of the same length."""
    if first.determining("weights") == second.determining("weights"):
        return True
    sources = [source.determining("data") for source in first.sources]
    return first.sequence_length == second.sequence_length and any(each.determining("data") in sources for each in second.sources)


def build_config(recipe: Recipe, tokenizer: KeuralTokenizer) -> "KeuralConfig":
    """The model configuration of a recipe with this tokenizer's ids."""
    from keural.model import KeuralConfig

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


def select_stages(recipe: Recipe, *, until: str | None = None, only: str | None = None) -> list[StageSpec]:
    """The stages up to and with `until`, or `only` that one, or all. Raises `UserError` for a name that no stage has."""
    if only is not None:
        return [recipe.stage(only)]
    last = recipe.stages.index(recipe.stage(until)) if until is not None else len(recipe.stages) - 1
    return list(recipe.stages[: last + 1])


def check_inputs(recipe: Recipe, stages: Sequence[StageSpec], out: Path, trains: bool = False) -> None:
    """Refuse what cannot work before anything is written: where a command trains, a number of processes that a stage cannot have;
    unknown adapters, missing paths, a model directory that is none.

    All that is wrong with the latter is said at once.
    """
    for stage in stages if trains else ():
        if (reason := why_not_on(stage, processes_started(), recipe.spec.model)) is not None:
            raise UserError(reason)
    directory = data_directory(recipe)
    checks: list[Callable[[], object]] = []
    if _kept_tokenizer(recipe, out) is None:
        checks.append(lambda: open_sources(recipe.spec.tokenizer.sources, directory))
    checks += [partial(_check_stage, recipe, stage, directory, out) for stage in stages]
    for_all(checks, lambda check: check())


def _check_stage(recipe: Recipe, stage: StageSpec, directory: Path | None, out: Path) -> None:
    if stage.lora is not None and find_spec("peft") is None:
        raise UserError(f"{stage.name}: lora needs the peft package: pip install 'keural[lora]'")
    if _kept_data(recipe, stage, out) is None:
        sources = open_stage_sources(stage.data, directory)
        check_evaluation(sources.evaluation)
        check_cleaning(sources)
        check_pretokenized(stage.data, directory)
    if stage.starts_from_directory:
        start = init_directory(out, stage)
        check_kind(start)
        _record_files(start)


def check_starts(recipe: Recipe, stages: Iterable[StageSpec], tokenizer: KeuralTokenizer, out: Path) -> None:
    """Refuse model directories that are not of the recipe's network or tokenizer, before data is prepared for them."""
    from keural.pretrained.agreement import check_agreement

    def check(stage: StageSpec) -> None:
        chats = OBJECTIVES[stage.objective].store != "documents"
        check_agreement(init_directory(out, stage), build_config(recipe, tokenizer), tokenizer.sha256, chats=chats)

    for_all([stage for stage in stages if stage.starts_from_directory], check)


def data_directory(recipe: Recipe) -> Path | None:
    """The directory that sources' paths are relative to, where the recipe gives one."""
    if recipe.spec.data is None:
        return None
    path = Path(recipe.spec.data).expanduser()
    if not path.is_dir():
        raise UserError(f"data={recipe.spec.data}: no such directory; give the directory with the unpacked data sets")
    return path


def init_directory(out: Path, stage: StageSpec) -> Path:
    """The model directory a stage starts from: another stage's, or what it names: a model, stage or run directory.

    Raises `UserError` when there is no model where the stage says.
    """
    if not stage.starts_from_directory:
        return out / stage.init_from / MODEL
    try:
        return model_directory(Path(stage.init_from).expanduser())
    except UserError as error:
        raise UserError(f"{stage.name}: init_from {error}") from error


def _record_files(directory: Path) -> dict[str, str]:
    """The checksums of a model directory's files, by which a stage knows the weights that it started from."""
    files: dict[str, str] = read_record(directory).get("files", {})
    if not files:
        raise UserError(
            f"{directory}: has no record ({LINEAGE}), by which a stage knows its weights again; `keural import {directory} NEW` "
            "makes a directory with one"
        )
    return files


def prepare_all(recipe: Recipe, stages: Iterable[StageSpec], out: Path) -> Workspace:
    """Tokenizer and token stores of the given stages and of those they start from; what is already there is only opened.

    A stage whose data cannot be used does not keep the others from being prepared. Raises `UnusableData` when all were tried.
    """
    claim(out, recipe)
    tokenizer = prepare_tokenizer(recipe, out)
    needed = {name: stage for stage in stages for name, stage in with_ancestors(recipe, stage).items()}
    data: dict[str, Prepared] = {}
    refused: dict[str, UserError] = {}
    for name, stage in needed.items():
        try:
            data[name] = _prepare_stage(recipe, stage, tokenizer, out)
        except UserError as error:
            refused[name] = error
    if refused:
        raise UnusableData(refused)
    return Workspace(recipe, out, tokenizer, data)


class UnusableData(UserErrors):
    """Stages whose data cannot be used; `tables` is what was counted of the sources of those that were read."""

    def __init__(self, refused: Mapping[str, UserError]) -> None:
        super().__init__(refused.values())
        self.tables = {name: error.table for name, error in refused.items() if isinstance(error, UnusableSources)}


def with_ancestors(recipe: Recipe, stage: StageSpec) -> dict[str, StageSpec]:
    """A stage and those it starts from, by name, the stage itself first."""
    chain = {stage.name: stage}
    while stage.predecessor is not None:
        stage = recipe.stage(stage.predecessor)
        chain[stage.name] = stage
    return chain


def _kept_data(recipe: Recipe, stage: StageSpec, out: Path) -> Prepared | None:
    """A stage's data as it was prepared with these settings, where the command is not told where its sources are."""
    spec, directory = stage.data, data_directory(recipe)
    evaluation = spec.decontaminate.sources if spec.decontaminate else []
    if not lacks_directory([*spec.sources, *spec.heldout_sources, *evaluation], directory) or not (out / DATA).is_dir():
        return None
    tokenizer = _kept_tokenizer(recipe, out)
    if tokenizer is None or not is_run_directory(out):
        return None
    return find_by_settings(spec, stage.objective, tokenizer, out / DATA, recipe.spec.seed)


def _kept_tokenizer(recipe: Recipe, out: Path) -> KeuralTokenizer | None:
    """The tokenizer that was trained in `out` with these settings, where the command is not told where its sources are; one that
    the recipe names.
    """
    spec, directory = recipe.spec.tokenizer, data_directory(recipe)
    if spec.path:
        path = (directory or Path()) / spec.path
        return KeuralTokenizer.load(path) if path.exists() else None
    marker = _tokenizer_marker(out / TOKENIZER) if lacks_directory(spec.sources, directory) else None
    if marker is None or _without_contents(marker.settings) != _without_contents(_tokenizer_settings(recipe, [], out)):
        return None
    return _load_tokenizer(out / TOKENIZER, marker)


def _without_contents(settings: Settings) -> Settings:
    return {name: value for name, value in settings.items() if name != "contents"}


def _prepare_stage(recipe: Recipe, stage: StageSpec, tokenizer: KeuralTokenizer, out: Path) -> Prepared:
    directory = data_directory(recipe)
    if (kept := _kept_data(recipe, stage, out)) is not None:
        return kept
    if stage.data.pretokenized:
        return open_pretokenized(stage.data, stage.objective, directory, tokenizer, out / DATA)
    return prepare(stage.data, stage.objective, directory, tokenizer, out / DATA, recipe.spec.seed)


def find_stage_data(recipe: Recipe, stage: StageSpec, out: Path) -> Prepared | None:
    """A stage's data if it is there in `out` (or tokenised already), made from the sources as they are now.

    Nothing is written but hashes.
    """
    if not stage.data.pretokenized and not (is_run_directory(out) and (out / DATA).is_dir()):
        return None
    path = recipe.spec.tokenizer.path
    directory = out / TOKENIZER if path is None else (data_directory(recipe) or Path()) / path
    if not directory.exists():
        return None
    tokenizer = KeuralTokenizer.load(directory)
    if stage.data.pretokenized:
        return _prepare_stage(recipe, stage, tokenizer, out)
    if (kept := _kept_data(recipe, stage, out)) is not None:
        return kept
    arguments = (stage.data, stage.objective, data_directory(recipe), tokenizer, out / DATA, recipe.spec.seed)
    return find_prepared(*arguments)


def prepare_tokenizer(recipe: Recipe, out: Path) -> KeuralTokenizer:
    """Load the recipe's tokenizer, or train it into `out/tokenizer` when it is not there yet.

    One of other settings is set aside, and that is said. Raises `UserError` when `out` is no run directory, or what is there is
    damaged.
    """
    claim(out, recipe)
    spec, directory = recipe.spec.tokenizer, out / TOKENIZER
    if spec.path:
        return KeuralTokenizer.load((data_directory(recipe) or Path()) / spec.path)
    if (kept := _kept_tokenizer(recipe, out)) is not None:
        return kept
    sources = open_sources(spec.sources, data_directory(recipe))
    settings = _tokenizer_settings(recipe, sources, out)
    marker = _tokenizer_marker(directory)
    if marker is not None and marker.fingerprint == fingerprint(settings):
        return _load_tokenizer(directory, marker)
    texts = iter_texts(sources, spec.max_bytes, recipe.spec.seed)
    with atomic_directory(directory) as temporary:
        with work_progress() as tell:
            tokenizer = train_tokenizer(_told(texts, recipe, tell), spec, temporary, recipe.spec.seed)
        files = tokenizer_files(temporary)
        TokenizerMarker(fingerprint=fingerprint(settings), settings=settings, sha256=tokenizer.sha256, files=files).write(
            temporary / DONE
        )
        if marker is not None:
            told = "; ".join(changes(marker.settings, settings))
            say(f"tokenizer: other settings ({told}); another one was trained, the old one is kept as {set_aside(directory)}")
    return tokenizer


def _told(texts: Iterable[str], recipe: Recipe, tell: Callable[[str], None]) -> Iterator[str]:
    """The texts that a tokenizer is trained on, told of as they are read, and once more when the training begins."""
    read = count = 0
    for text in texts:
        count, read = count + 1, read + len(text)
        if count % 100 == 1:
            tell(f"tokenizer: reading, {count:,} texts, {read / 1e6:,.1f} million characters")
        yield text
    spec = recipe.spec.tokenizer
    tell(f"tokenizer: training {spec.vocab_size:,} pieces on {count:,} texts, {read / 1e6:,.1f} million characters")


def _tokenizer_marker(directory: Path) -> TokenizerMarker | None:
    """The marker of a trained tokenizer. Raises `UserError` when something is there that nothing shows to be one."""
    marker = TokenizerMarker.find(directory / DONE)
    if marker is None and os.path.lexists(directory):
        raise UserError(f"{directory}: is in the way: nothing there shows that a run has made it (no {DONE}); move it away")
    return marker


def _load_tokenizer(directory: Path, marker: TokenizerMarker) -> KeuralTokenizer:
    for name, expected in marker.files.items():
        path = directory / name
        if not path.is_file() or sha256_file(path) != expected:
            raise UserError(f"{path}: damaged (its checksum differs) or gone; delete {directory} and run the same command again")
    return KeuralTokenizer.load(directory)


def _tokenizer_settings(recipe: Recipe, sources: list[Source], out: Path) -> Settings:
    """Everything that determines a trained tokenizer: its settings and the contents of its sources."""
    spec, hashes = recipe.spec.tokenizer, FileHashes(out / DATA / HASHES)
    contents = [source.content(hashes) for source in sources]
    hashes.save()
    return {"version": VERSION, "spec": spec.determining("tokenizer"), "seed": recipe.spec.seed, "contents": contents}


def open_stream(workspace: Workspace, stage: StageSpec) -> Stream:
    """The stream of batches that a stage trains on."""
    length, train, tokenizer = stage.data.sequence_length, stage.train, workspace.tokenizer
    rows = None if train.batch_tokens is None else train.batch_tokens // length
    settings = (stage.objective, length, rows, train.batch_records, workspace.seed(stage))
    return workspace.data[stage.name].corpus.stream(*settings, tokenizer.sha256, tokenizer.vocab_size)
