"""Recipes: what a run is made of, as strict typed objects read from YAML.

A recipe is a directory: `recipe.yaml` names the model, the tokenizer, the evaluation and the stages in order; `<stage>.yaml`
describes one stage. Everything is checked when it is read: an unknown key, a wrong type or an impossible combination is a
`UserError` that names the file and the key. Any value can be overridden as `key=value`: a key of `recipe.yaml` (`seed=1`,
`data=DIR`, `model.hidden_size=256`), a key of every stage (`train.lr=1e-5`), or a key of one stage (`sft-2.train.lr=1e-5`).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from keural.errors import UserError, nearest

SpecT = TypeVar("SpecT", bound=BaseModel)
Objective = Literal["next_token", "sft", "dpo"]
GateAction = Literal["drop", "count", "skip"]
"""What becomes of a record that a gate finds: it is dropped, or kept and counted, or the gate does not look at all."""
RESERVED_NAMES = {"data", "final", "random", "recipe", "tokenizer", "untrained"}
"""What else a run directory, a key or a model is called; no stage may be."""


class Spec(BaseModel):
    """Base of all recipe objects: strict types, no unknown keys, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ModelSpec(Spec):
    """Shape of the network; the defaults are the published 14.83B model."""

    hidden_size: int = Field(4096, gt=0)
    intermediate_size: int = Field(5632, gt=0)
    """Width of one expert."""
    num_hidden_layers: int = Field(24, gt=0)
    num_attention_heads: int = Field(32, gt=0)
    num_key_value_heads: int = Field(8, gt=0)
    head_dim: int = Field(128, gt=0)
    num_local_experts: int = Field(8, gt=0)
    num_experts_per_tok: int = Field(2, gt=0)
    sliding_window: int = Field(513, gt=0)
    """Keys a token of a sliding (even) layer sees, itself included."""
    max_position_embeddings: int = Field(4096, gt=0)
    rope_theta: float = Field(500_000.0, gt=0)
    rms_norm_eps: float = Field(1e-5, gt=0)
    initializer_range: float = Field(0.02, gt=0)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError("num_experts_per_tok cannot exceed num_local_experts")
        if self.head_dim % 2:
            raise ValueError("head_dim must be even (rotary embedding turns pairs)")
        if self.hidden_size % 8 or self.intermediate_size % 8:
            raise ValueError("hidden_size and intermediate_size must be multiples of 8 (grouped products need aligned rows)")
        return self


class SourceSpec(Spec):
    """One source of rows: where they are, how a row is read, and what is known of it."""

    name: str = Field(min_length=1)
    adapter: str = Field(min_length=1)
    """Name in the adapter registry: how a row becomes a document, a conversation or a pair."""
    path: str = ""
    """File, directory or glob, relative to the recipe's data directory."""
    format: str | None = None
    """Reader of the file; the default follows from the suffix."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the adapter and reader, e.g. names of fields."""
    hub: str | None = None
    """Where the files come from (a dataset hub id): read from there when there is no `path`, and named when files are missing."""
    revision: str | None = None
    """Commit of `hub`, 40 digits."""
    config: str | None = None
    """Configuration (subset) of `hub`."""
    split: str | None = None
    """Split of `hub`, `train` where none is given."""
    language: str | None = None
    license: str | None = None
    limit: int | None = Field(None, gt=0)
    """Use at most this many kept records, in file order."""
    repeat: int = Field(1, gt=0)
    """How often each record of the source is put into one epoch."""
    text_kind: Literal["ko", "en", "code", "any"] | None = None
    """Which filters clean its documents (`data.cleaning`); by default those of its language, and `any` has none."""
    weight: float | None = Field(None, gt=0)
    """The source's part of an epoch, relative to the other sources' weights; with `data.mixing`, and then without `repeat`."""
    expect: int | None = Field(None, ge=0)
    """Number of records that should be kept (a published count); another number is warned about."""
    max_drop: float = Field(0.5, ge=0, le=1)
    """Refuse the source when a larger share of its rows is dropped; 0 refuses at the first bad row."""
    gates: dict[str, GateAction] = Field(default_factory=dict)
    """What the gates do (`keural.data.gates`), where that differs from the adapter's default: `{refusals: skip}`."""
    min_characters: int = Field(0, ge=0)
    """Drop conversations and pairs with an answer shorter than this."""
    max_characters: int | None = Field(None, gt=0)
    """Drop conversations and pairs with a turn longer than this."""
    max_length_ratio: float | None = Field(None, ge=1)
    """Drop pairs of which one answer is this many times longer than the other."""
    id_field: str | None = None
    """Field with the id of a row, or `row_number`: a record whose id was there before in the same `id_space` is a duplicate."""
    id_space: str | None = None
    """Name that sources share whose ids mean the same, e.g. a set and its translation; the default is the source's own."""


class LicensesSpec(Spec):
    """Which licences a stage's data may have; patterns such as `*-NC-*`, case aside."""

    allow: list[str] = Field(default_factory=list)
    """Use only sources of these licences; one that states none is left out. Empty: all."""
    exclude: list[str] = Field(default_factory=list)
    """Leave out sources of these licences; `non-commercial`: all that forbid commercial use, `unknown`: those that state none."""


class MixingSpec(Spec):
    """How sources are mixed by their weights. An epoch is counted in what batches are: tokens, for dpo in pairs."""

    epoch: int | Literal["scarcest"] = "scarcest"
    """Size of an epoch; `scarcest`: the largest in which no source is needed more often than `max_repeat`."""
    max_repeat: float = Field(4.0, ge=1)
    """How often a source may be used in one epoch. Up to four times repeated data is nearly as good as new (Muennighoff et al.
    2023, "Scaling Data-Constrained Language Models")."""
    scarce: Literal["refuse", "renormalise"] = "refuse"
    """When a source has too little for its share of the epoch: refuse, or use it `max_repeat` times and share what is missing
    among the others by their weights."""

    @field_validator("epoch")
    @classmethod
    def _epoch_positive(cls, epoch: int | str) -> int | str:
        if isinstance(epoch, int) and epoch <= 0:
            raise ValueError("must be a number above 0, or scarcest")
        return epoch


class StoreSpec(Spec):
    """One of several ready token stores."""

    name: str = Field(min_length=1)
    path: str = Field(min_length=1)
    """Directory, relative to the recipe's data directory."""
    weight: float | None = Field(None, gt=0)
    """Its part of an epoch, relative to the other stores' weights; with `data.mixing`. Without, each is used once."""
    language: str | None = None


class TokenizerSpec(Spec):
    """Which tokenizer: one to train from `sources`, or one to load from `path`."""

    kind: Literal["lossless", "published"] = "lossless"
    path: str | None = None
    """A SentencePiece model file or tokenizer directory to load instead of training; relative to the data directory."""
    vocab_size: int = Field(131_072, gt=260)
    """SentencePiece pieces; the two ChatML markers come after them."""
    character_coverage: float = Field(0.9995, gt=0, le=1)
    split_digits: bool = True
    max_bytes: int = Field(100_000_000, gt=0)
    """Train on at most this many bytes of text, spread evenly over the sources' documents."""
    sources: list[SourceSpec] = Field(default_factory=list)

    @model_validator(mode="after")
    def _trained_or_loaded(self) -> Self:
        if bool(self.path) == bool(self.sources):
            raise ValueError("give either path (load a tokenizer) or sources (train one)")
        if any(source.weight for source in self.sources):
            raise ValueError("sources: weight is for a stage's sources; a tokenizer's have repeat and limit")
        if any(source.text_kind for source in self.sources):
            raise ValueError("sources: text_kind is for data.cleaning; a tokenizer's sources are read as they are")
        return self


class DecontaminateSpec(Spec):
    """Evaluation sets that training data must not hold; every kind of record is looked through, what is held out is not."""

    sources: list[SourceSpec] = Field(min_length=1)
    """The sets, each by its own adapter (`kobest_boolq`, `gsm8k`, ..) or by `evaluation` with the fields' names as options."""
    ngram: int = Field(13, ge=5)
    """Words of an item that must be found together; fewer when they are long (`keural.data.contamination`)."""
    min_share: float = Field(0.0, ge=0, le=1)
    """Share of an item's n-grams that must be found; 0: one is enough. Items that are found whole always count."""
    passages: bool = True
    """Look for the passages that questions are about, too; false keeps the articles that they were taken from."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        unused = {"limit", "repeat", "weight", "expect", "text_kind", "gates", "min_characters", "max_characters", "id_field"}
        for source in self.sources:
            if given := sorted(unused & source.model_fields_set):
                raise ValueError(
                    f"sources: {given[0]} of {source.name!r} has no effect; every item of an evaluation set is looked for"
                )
        return self


class ExecutorSpec(Spec):
    """Where cleaning runs: processes here, jobs on a Slurm cluster, or Ray."""

    kind: Literal["local", "slurm", "ray"] = "local"
    workers: int | None = Field(None, gt=0)
    """Tasks at a time; the default is one per core here, all at once on a cluster."""
    cpus_per_task: int = Field(1, gt=0)
    mem_per_cpu_gb: int = Field(2, gt=0)
    partition: str | None = None
    time: str = "24:00:00"
    """Limit of a Slurm job."""
    qos: str | None = None
    sbatch: dict[str, str] = Field(default_factory=dict)
    """Further options of `sbatch`, without dashes."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        slurm = {"partition", "time", "qos", "sbatch"} & self.model_fields_set
        if self.kind == "slurm" and self.partition is None:
            raise ValueError("executor kind slurm needs a partition")
        if self.kind != "slurm" and slurm:
            raise ValueError(f"executor kind {self.kind} does not take {', '.join(sorted(slurm))}")
        if self.kind == "local" and (unused := {"cpus_per_task", "mem_per_cpu_gb"} & self.model_fields_set):
            raise ValueError(f"executor kind local does not take {', '.join(sorted(unused))}")
        return self


class CleaningSpec(Spec):
    """Cleaning of documents before they are tokenised (next_token), as in FineWeb-2."""

    tasks: int = Field(16, gt=0)
    """Into so many parts the files are divided; an interruption costs the parts that were at work."""
    language_id: Literal["script", "fasttext"] = "script"
    """By the letters, or by a fastText model."""
    model: str | None = None
    """File of a fastText model (GlotLID, lid.176), relative to the data directory."""
    deduplicate: bool = True
    """Keep one of each group of near-duplicates, across all sources (MinHash)."""
    filters: bool = True
    """Filter by quality, by the kind of each source's text."""
    personal_data: bool = True
    """Replace e-mail and IP addresses, Korean resident, phone and account numbers."""
    examples: int = Field(3, ge=0)
    """Dropped documents to show of each reason."""
    executor: ExecutorSpec = Field(default_factory=ExecutorSpec)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if (self.language_id == "fasttext") != (self.model is not None):
            raise ValueError("language_id fasttext needs model, the file, and nothing else takes one")
        return self


class DataSpec(Spec):
    """A stage's data: sources or data that is ready, length of a packed row, and what is held out."""

    sources: list[SourceSpec] = Field(default_factory=list)
    store: str | None = None
    """Instead of sources: a token store, or a directory with `train/` and perhaps `heldout/`, as data was prepared before."""
    stores: list[StoreSpec] = Field(default_factory=list)
    """Instead of sources: several token stores."""
    shards: str | None = None
    """Instead of sources (next_token): a directory of published shards, `keural_NNN.bin`, `.idx` and `.meta`, as they are."""
    mixing: MixingSpec | None = None
    """Mix sources or stores by weight."""
    sequence_length: int = Field(gt=1)
    """Tokens of a packed row (next_token, sft) or of one side of a pair with its prompt (dpo)."""
    heldout_per_mille: float = Field(0.0, ge=0, lt=1000)
    """Share of records held out, chosen by a hash of their content."""
    heldout_sources: list[SourceSpec] = Field(default_factory=list)
    """Sources that are held out whole; they never enter training."""
    min_characters: int = Field(0, ge=0)
    """Drop documents shorter than this (next_token)."""
    licenses: LicensesSpec = Field(default_factory=LicensesSpec)
    """Sources are left out by licence, and shown as left out in the table."""
    cleaning: CleaningSpec | None = None
    """Clean the documents of all sources first (next_token)."""
    benchmarks: bool = True
    """Train on sources that are benchmarks; false leaves them out."""
    decontaminate: DecontaminateSpec | None = None
    """Drop records that hold items of these evaluation sets (gate `contaminated`)."""

    @property
    def ready(self) -> bool:
        """Whether the data is tokenised already."""
        return not self.sources

    @model_validator(mode="after")
    def _possible(self) -> Self:
        given = [name for name in ("sources", "store", "stores", "shards") if getattr(self, name)]
        if len(given) != 1:
            found = f", not {' and '.join(given)}" if given else ""
            raise ValueError(f"give exactly one of sources, store, stores, shards{found}")
        everything = (*self.sources, *self.heldout_sources)
        if repeated := [source.name for source in self.heldout_sources if source.repeat != 1]:
            raise ValueError(f"heldout_sources: repeat of {repeated[0]!r} is for training; what is held out is never repeated")
        if self.decontaminate is None and (gated := [source.name for source in everything if "contaminated" in source.gates]):
            raise ValueError(f"gate contaminated of {gated[0]!r} needs data.decontaminate")
        if self.cleaning is None and (kinds := [source.name for source in everything if source.text_kind]):
            raise ValueError(f"text_kind of {kinds[0]!r} needs data.cleaning; write cleaning: {{}} for its defaults")
        if self.ready:
            for name in (
                "heldout_per_mille",
                "heldout_sources",
                "min_characters",
                "licenses",
                "benchmarks",
                "cleaning",
                "decontaminate",
            ):
                if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True):
                    raise ValueError(f"{name} is for sources; data in {given[0]} is used as it is")
        names = [store.name for store in self.stores]
        if doubled := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"stores: two are called {doubled!r}")
        _check_weights(self)
        return self


def _check_weights(data: DataSpec) -> None:
    """Raise ValueError unless all parts have a weight, and `mixing` says what it means, or none has."""
    parts: list[SourceSpec | StoreSpec] = [*data.sources, *data.stores]
    weighted = [part.name for part in parts if part.weight is not None]
    if any(source.weight is not None for source in data.heldout_sources):
        raise ValueError("heldout_sources: weight is for training; what is held out is never repeated")
    if data.mixing is None:
        if weighted:
            raise ValueError(f"weight of {weighted[0]!r} needs data.mixing; write mixing: {{}} for its defaults")
        return
    if not parts:
        raise ValueError("mixing is for sources or stores with weights")
    names = [part.name for part in parts]
    if doubled := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"mixing: two parts are called {doubled[0]!r}; give each a name of its own")
    if missing := [part.name for part in parts if part.weight is None]:
        raise ValueError(f"mixing needs a weight for every part; {missing[0]!r} has none")
    if repeated := [source.name for source in data.sources if source.repeat != 1]:
        raise ValueError(f"source {repeated[0]!r}: repeat and weight exclude each other; with mixing give weight alone")


class TrainSpec(Spec):
    """Optimisation of one stage: one of `steps`, `epochs`, `budget_share`; batches are per optimizer step, not per device."""

    steps: int | None = Field(None, gt=0)
    epochs: float | None = Field(None, gt=0)
    budget_share: float | None = Field(None, gt=0, le=1)
    """Share of the recipe's time budget; the number of steps is measured and fixed before step 0."""
    batch_tokens: int | None = Field(None, gt=0)
    """Tokens per optimizer step (next_token, sft): a multiple of data.sequence_length."""
    batch_pairs: int | None = Field(None, gt=0)
    """Preference pairs per optimizer step (dpo)."""
    micro_batch_tokens: int | None = Field(None, gt=0)
    """Upper bound of tokens in one forward pass on one rank; default: the rank's whole share at once."""
    lr: float = Field(gt=0)
    min_lr: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    betas: list[float] = Field(default_factory=lambda: [0.9, 0.95], min_length=2, max_length=2)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    """Applied to matrices only, never to norms."""
    clip_norm: float = Field(1.0, gt=0)
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    compile: bool = False
    save_every: int | None = Field(None, gt=0)
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = Field(1, gt=0)
    evaluate_every: int | None = Field(None, gt=0)
    """Steps between evaluations on held-out data; it is always evaluated at the end."""

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, betas: list[float]) -> list[float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("betas must lie in [0, 1)")
        return betas

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if sum(value is not None for value in (self.steps, self.epochs, self.budget_share)) != 1:
            raise ValueError("give exactly one of steps, epochs, budget_share")
        if self.min_lr > self.lr:
            raise ValueError("min_lr cannot exceed lr")
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise ValueError("warmup_steps must be smaller than steps")
        return self


class RouterSpec(Spec):
    """Router losses, added to every objective: coefficient times the mean over layers, on non-padding tokens."""

    balance_coef: float = Field(0.02, ge=0)
    z_coef: float = Field(0.001, ge=0)
    scope: Literal["global_batch", "micro_batch"] = "global_batch"
    """Tokens over which the load is balanced: the whole optimizer step (exact), or each forward pass (as published)."""


class DpoSpec(Spec):
    """Direct preference optimisation."""

    beta: float = Field(0.1, gt=0)
    loss: Literal["sigmoid"] = "sigmoid"


class StageSpec(Spec):
    """One training stage."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    objective: Objective
    init_from: str = "random"
    """`random`, the name of an earlier stage, or a model directory."""
    data: DataSpec
    train: TrainSpec
    router: RouterSpec = Field(default_factory=RouterSpec)
    dpo: DpoSpec = Field(default_factory=DpoSpec)
    notes: list[str] = Field(default_factory=list)
    """Where the numbers come from, contradictions included."""

    @property
    def starts_from_directory(self) -> bool:
        """Whether `init_from` is a model directory: a path, which has a slash."""
        return "/" in self.init_from

    @property
    def predecessor(self) -> str | None:
        """The earlier stage that `init_from` names; None for random weights and for a model directory."""
        return None if self.init_from == "random" or self.starts_from_directory else self.init_from

    @model_validator(mode="after")
    def _possible(self) -> Self:
        train, length = self.train, self.data.sequence_length
        if self.data.shards and self.objective != "next_token":
            raise ValueError(f"data.shards hold documents; objective {self.objective} cannot train on them")
        if self.objective == "dpo":
            if train.batch_pairs is None or train.batch_tokens is not None:
                raise ValueError("objective dpo needs train.batch_pairs and no train.batch_tokens")
            if self.data.cleaning is not None:
                raise ValueError("data.cleaning is for documents; objective dpo has gates per source")
            if self.init_from == "random":
                raise ValueError("objective dpo needs init_from: an earlier stage or a model directory")
        else:
            if train.batch_tokens is None or train.batch_pairs is not None:
                raise ValueError(f"objective {self.objective} needs train.batch_tokens and no train.batch_pairs")
            if train.batch_tokens % length:
                raise ValueError(f"train.batch_tokens {train.batch_tokens} is not a multiple of data.sequence_length {length}")
            if self.objective != "next_token" and self.data.cleaning is not None:
                raise ValueError(f"data.cleaning is for documents; objective {self.objective} has gates per source")
            if "dpo" in self.model_fields_set:
                raise ValueError(f"dpo settings have no effect with objective {self.objective}")
        row = 2 * length if self.objective == "dpo" else length
        if train.micro_batch_tokens is not None and train.micro_batch_tokens < row:
            raise ValueError(f"train.micro_batch_tokens {train.micro_batch_tokens} is smaller than one packed row ({row} tokens)")
        return self


class ExactMatchSpec(Spec):
    """Held-out exact match, greedy: the toy world's items, by task and language, and its preference pairs."""

    items_per_task: int = Field(60, gt=0)
    pairs: int = Field(200, gt=0)
    max_new_tokens: int = Field(48, gt=0)


class BitsPerByteSpec(Spec):
    """Bits per byte on held-out text, with `xz -9` on the same text beside it."""

    name: str
    stage: str
    """The stage whose held-out documents are measured."""
    language: str | None = None
    """Only documents of this language."""
    max_bytes: int = Field(200_000, gt=0)


class EvaluationSpec(Spec):
    """What is measured at the end (and, for before-and-after figures, on the models named by each measure)."""

    exact_match: ExactMatchSpec | None = None
    bits_per_byte: list[BitsPerByteSpec] = Field(default_factory=list)


class ChatSpec(Spec):
    """Defaults of a chat with the final model, and the prompts whose answers the report shows."""

    system: str | None = None
    temperature: float = Field(0.7, ge=0)
    top_p: float = Field(0.9, gt=0, le=1)
    repetition_penalty: float = Field(1.1, gt=0)
    max_new_tokens: int = Field(256, gt=0)
    samples: list[str] = Field(default_factory=list)


class RecipeSpec(Spec):
    """`recipe.yaml`: everything that is not one stage's own."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    description: str = ""
    seed: int = Field(42, ge=0)
    data: str | None = None
    """Directory that sources' paths are relative to; needed where a source has a path."""
    budget: str | None = None
    """Time for all stages with a budget_share, e.g. 20m, 90s, 2h."""
    model: ModelSpec = Field(default_factory=ModelSpec)
    tokenizer: TokenizerSpec
    stages: list[str] = Field(min_length=1)
    evaluation: EvaluationSpec = Field(default_factory=EvaluationSpec)
    chat: ChatSpec = Field(default_factory=ChatSpec)
    notes: list[str] = Field(default_factory=list)

    @field_validator("budget")
    @classmethod
    def _budget_parses(cls, budget: str | None) -> str | None:
        if budget is not None:
            parse_duration(budget)
        return budget


@dataclass(frozen=True)
class Recipe:
    """A whole recipe: the pipeline's settings and its stages in order."""

    spec: RecipeSpec
    stages: tuple[StageSpec, ...]
    directory: Path

    def stage(self, name: str) -> StageSpec:
        """The stage called `name`. Raises `UserError` naming the nearest one."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise UserError(f"{self.directory}: no stage {name!r}{nearest(name, [stage.name for stage in self.stages])}")

    def resolved(self) -> dict[str, Any]:
        """Every setting, defaults included, as plain data."""
        return {"recipe": self.spec.model_dump(), "stages": [stage.model_dump() for stage in self.stages]}


def parse_duration(text: str) -> float:
    """Seconds of `90s`, `20m`, `1.5h`. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", text.strip())
    if not match or float(match[1]) == 0:
        raise ValueError(f"{text!r} is not a duration (write 90s, 20m or 2h)")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def load_recipe(directory: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read `directory/recipe.yaml` and the stages it names, apply `key=value` overrides, and check everything.

    Raises `UserError` for a missing file, an unknown key (with the nearest valid one), a wrong type or an impossible combination.
    """
    if directory.is_file():
        raise UserError(f"{directory}: a recipe is a directory with a recipe.yaml; give {directory.parent}")
    recipe_file = directory / "recipe.yaml"
    recipe_data = _read_yaml(recipe_file)
    names = recipe_data.get("stages")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{recipe_file}: key 'stages' must be a list of stage names")
    stage_data = {name: _read_yaml(directory / f"{name}.yaml") for name in names}
    for override in overrides:
        _apply_override(override, recipe_data, stage_data, recipe_file)
    spec = validate(RecipeSpec, recipe_data, recipe_file)
    stages = tuple(validate(StageSpec, data, directory / f"{name}.yaml") for name, data in stage_data.items())
    recipe = Recipe(spec, stages, directory)
    _check_stages(recipe)
    return recipe


def _check_stages(recipe: Recipe) -> None:
    """What one file alone cannot show: names, order, lengths, budget."""
    earlier: list[str] = []
    for name, stage in zip(recipe.spec.stages, recipe.stages, strict=False):
        file = recipe.directory / f"{name}.yaml"
        if name in RESERVED_NAMES:
            raise UserError(f"{file}: a stage cannot be called {name!r}; choose another name")
        if stage.name != name:
            raise UserError(f"{file}: name {stage.name!r} differs from the file's; call it {name!r}")
        if recipe.spec.stages.count(name) > 1:
            raise UserError(f"{recipe.directory / 'recipe.yaml'}: stage {name!r} is listed twice")
        if stage.init_from in recipe.spec.stages and stage.init_from not in earlier:
            raise UserError(f"{file}: init_from {stage.init_from!r} is not an earlier stage")
        if stage.predecessor is not None and stage.predecessor not in earlier:
            hint = nearest(stage.init_from, ["random", *earlier])
            raise UserError(
                f"{file}: init_from {stage.init_from!r} is no earlier stage{hint}; write a model directory with a slash"
            )
        if stage.train.budget_share is not None and recipe.spec.budget is None:
            raise UserError(f"{file}: train.budget_share needs a budget: set budget in recipe.yaml or give budget=20m")
        if stage.data.sequence_length > recipe.spec.model.max_position_embeddings:
            raise UserError(f"{file}: data.sequence_length exceeds model.max_position_embeddings")
        earlier.append(name)
    for measure in recipe.spec.evaluation.bits_per_byte:
        if measure.stage not in earlier:
            hint = nearest(measure.stage, earlier)
            raise UserError(f"{recipe.directory / 'recipe.yaml'}: evaluation.bits_per_byte: no stage {measure.stage!r}{hint}")
    shares = sum(stage.train.budget_share or 0 for stage in recipe.stages)
    if shares > 1 + 1e-9:
        raise UserError(f"{recipe.directory}: the stages' budget_share sum to {shares:.3f}, more than 1")


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but `1e-4` is a number and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path}: no such file; a recipe directory holds recipe.yaml and one file per stage") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, a date or number that cannot be
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: is {'empty' if value is None else 'not a mapping'}; expected keys and values")
    return value


def _apply_override(override: str, recipe: dict[str, Any], stages: dict[str, dict[str, Any]], file: Path) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r}: write key=value, e.g. train.lr=1e-5")
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"override {_shortened(override)!r}: the value is not valid YAML") from error
    head, _, rest = key.partition(".")
    if head in stages and rest:
        _set(stages[head], rest, value, override)
    elif head in RecipeSpec.model_fields and not (head == "data" and rest):  # data=DIR, but data.sequence_length=512
        if head == "stages":
            raise UserError(f"override {override!r}: stages cannot be overridden; edit {file} or use --until")
        if key in {"data", "budget"} and isinstance(value, int | float):
            value = text
        _set(recipe, key, value, override)
    elif head in StageSpec.model_fields:
        only_dpo = bool(rest) and head == "dpo"
        meant = [stage for stage in stages.values() if not only_dpo or stage.get("objective") == "dpo"]
        if not meant:
            raise UserError(f"override {override!r}: no stage has objective dpo")
        for stage in meant:
            _set(stage, key, value, override)
    else:
        known = [*RecipeSpec.model_fields, *StageSpec.model_fields, *stages]
        raise UserError(f"override {override!r}: unknown key {head!r}{nearest(head, known)}")


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _set(data: dict[str, Any], key: str, value: Any, override: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise UserError(f"override {override!r}: {parent!r} is not a mapping")
    data[last] = value


def validate(kind: type[SpecT], data: dict[str, Any], file: Path) -> SpecT:
    """`data`, read from `file`, as a typed object. Raises `UserError` naming the file and the worst key."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        worst = min(
            error.errors(), key=lambda item: item["type"] != "extra_forbidden"
        )  # a misspelt key also shows as a missing one
        raise UserError(f"{file}: {_describe(worst, kind)}") from error


def _describe(error: Any, kind: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}{nearest(re.sub(r'[.][0-9]+[.]', '.', key), _keys(kind))}"
    if error["type"] == "missing":
        return f"key {key!r} is missing"
    if error["type"] == "value_error":
        return f"{key + ': ' if key else ''}{error['ctx']['error']}"
    return f"key {key!r}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


def _keys(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted keys of a spec."""
    keys = []
    for name, field in kind.model_fields.items():
        keys.append(prefix + name)
        for inner in [field.annotation, *getattr(field.annotation, "__args__", ())]:
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                keys += _keys(inner, f"{prefix}{name}.")
    return keys
