"""What a recipe's stages work on: tokenizer, data, and the models they start from."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from keural.data.filtering.decontamination import check_evaluation
from keural.data.loading.stream import Stream
from keural.data.prepare import check_cleaning, prepare
from keural.data.prepared import Prepared, find_prepared
from keural.data.pretokenized import check_pretokenized, open_pretokenized
from keural.data.sources import FileHashes, Source, open_sources
from keural.data.stage_sources import open_stage_sources
from keural.data.tokenizer_texts import iter_texts
from keural.errors import UserError
from keural.files import fingerprint, read_object, write_json
from keural.pipeline.run_directory import is_done, set_aside
from keural.recipe import VERSION, Recipe, StageSpec
from keural.tokenizer import KeuralTokenizer
from keural.tokenizer.train import train_tokenizer

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

    def stage_fingerprint(self, stage: StageSpec) -> str:
        """Of everything that determines the stage's weights: its settings, its data, and the model it starts from."""
        return fingerprint(
            {
                "version": VERSION,
                "stage": stage.determining("weights"),
                "model": self.recipe.spec.model.determining("weights"),
                "seed": self.recipe.spec.seed,
                "budget": self.recipe.spec.budget if stage.train.budget_share is not None else None,
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
            files = read_object(lineage).get("files")
            if not isinstance(files, dict):
                raise UserError(f"{lineage}: names no files; give a model directory that this package has written")
            return fingerprint(sorted(files.items()))
        return self.stage_fingerprint(self.recipe.stage(stage.init_from))


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


def check_inputs(recipe: Recipe, stages: Sequence[StageSpec], out: Path) -> None:
    """Refuse what cannot work before anything is written: unknown adapters, missing paths, a model directory that is none."""
    open_sources(recipe.spec.tokenizer.sources, data_directory(recipe))
    opened = [open_stage_sources(stage.data, data_directory(recipe)) for stage in stages]
    for stage, sources in zip(stages, opened, strict=True):
        check_evaluation(sources.evaluation)
        check_cleaning(sources)
        check_pretokenized(stage.data, data_directory(recipe))
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
    needed = {name: stage for stage in stages for name, stage in with_ancestors(recipe, stage).items()}
    data = {name: _prepare_stage(recipe, stage, tokenizer, out) for name, stage in needed.items()}
    return Workspace(recipe, out, tokenizer, data)


def with_ancestors(recipe: Recipe, stage: StageSpec) -> dict[str, StageSpec]:
    """A stage and those it starts from, by name, the stage itself first."""
    chain = {stage.name: stage}
    while stage.predecessor is not None:
        stage = recipe.stage(stage.predecessor)
        chain[stage.name] = stage
    return chain


def _prepare_stage(recipe: Recipe, stage: StageSpec, tokenizer: KeuralTokenizer, out: Path) -> Prepared:
    directory = data_directory(recipe)
    if stage.data.pretokenized:
        return open_pretokenized(stage.data, stage.objective, directory, tokenizer, out / "data")
    return prepare(stage.data, stage.objective, directory, tokenizer, out / "data", recipe.spec.seed)


def find_stage_data(recipe: Recipe, stage: StageSpec, out: Path) -> Prepared | None:
    """A stage's data if it is there in `out` (or tokenised already), made from the sources as they are now; nothing is written but hashes."""
    if not stage.data.pretokenized and not (out / "data").is_dir():
        return None
    path = recipe.spec.tokenizer.path
    directory = out / "tokenizer" if path is None else (data_directory(recipe) or Path()) / path
    if not directory.exists():
        return None
    tokenizer = KeuralTokenizer.load(directory)
    if stage.data.pretokenized:
        return _prepare_stage(recipe, stage, tokenizer, out)
    arguments = (stage.data, stage.objective, data_directory(recipe), tokenizer, out / "data", recipe.spec.seed)
    return find_prepared(*arguments)


def prepare_tokenizer(recipe: Recipe, out: Path) -> KeuralTokenizer:
    """Load the recipe's tokenizer, or train it into `out/tokenizer` when it is not there yet."""
    spec, directory = recipe.spec.tokenizer, out / "tokenizer"
    if spec.path:
        return KeuralTokenizer.load((data_directory(recipe) or Path()) / spec.path)
    sources = open_sources(spec.sources, data_directory(recipe))
    wanted = _tokenizer_fingerprint(recipe, sources, out)
    marker = directory / "done.json"
    if is_done(directory, wanted):
        tokenizer = KeuralTokenizer.load(directory)
        if tokenizer.sha256 != read_object(marker).get("sha256"):
            raise UserError(f"{directory / 'tokenizer.model'}: damaged (its checksum differs); delete {directory} and run again")
        return tokenizer
    set_aside(directory)
    texts = iter_texts(sources, spec.max_bytes, recipe.spec.seed)
    tokenizer = train_tokenizer(texts, spec, directory, recipe.spec.seed)
    write_json(marker, {"fingerprint": wanted, "sha256": tokenizer.sha256})
    return tokenizer


def _tokenizer_fingerprint(recipe: Recipe, sources: list[Source], out: Path) -> str:
    """Of everything that determines a trained tokenizer: its settings and the contents of its sources."""
    spec, cache = recipe.spec.tokenizer, out / "data" / "file-hashes.json"
    hashes = FileHashes(read_object(cache) if cache.is_file() else None)
    contents = [source.content(hashes) for source in sources]
    if hashes.changed:
        write_json(cache, hashes.known)
    return fingerprint({"version": VERSION, "spec": spec.determining("tokenizer"), "seed": recipe.spec.seed, "contents": contents})


def open_stream(workspace: Workspace, stage: StageSpec) -> Stream:
    """The stream of batches that a stage trains on."""
    length, train, tokenizer = stage.data.sequence_length, stage.train, workspace.tokenizer
    rows = None if train.batch_tokens is None else train.batch_tokens // length
    settings = (stage.objective, length, rows, train.batch_pairs, workspace.recipe.spec.seed)
    return workspace.data[stage.name].corpus.stream(*settings, tokenizer.sha256, tokenizer.vocab_size)
