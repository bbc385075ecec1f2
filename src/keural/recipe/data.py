"""A stage's data: sources, gates, mixing, cleaning, decontamination."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from keural.limits import LARGEST_SIZE
from keural.recipe.base import BOUNDED, Spec, neutral, not_for

GateAction = Literal["drop", "count", "skip"]
"""What becomes of a record that a gate finds: it is dropped, or kept and counted, or the gate does not look at all."""


class SourceSpec(Spec):
    """One source of rows: where they are, how a row is read, and what is known of it."""

    name: str = Field(min_length=1)
    """What tables, reports and messages call the source; where data is mixed, each part needs a name of its own."""
    adapter: str = Field(min_length=1)
    """Name in the adapter registry: how a row becomes a document, a conversation or a pair."""
    path: str = ""
    """File, directory or glob, relative to the recipe's data directory."""
    format: str | None = None
    """Reader of the file; the default follows from the suffix."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the adapter and reader, e.g. names of fields."""
    as_labels: bool = False
    """Take its records as single answers with a label: of rows with a label the bad ones, too (which are dropped otherwise), of
    pairs the chosen answer as a good one and the rejected one as a bad one. With objective kto sources are taken so."""
    hub: str | None = not_for(("cleaning",), None)
    """Where the files come from (a dataset hub id): read from there when there is no `path`, and named when files are missing."""
    revision: str | None = None
    """Commit of `hub`, 40 digits."""
    config: str | None = None
    """Configuration (subset) of `hub`."""
    split: str | None = None
    """Split of `hub`, `train` where none is given."""
    language: str | None = None
    """Language of its texts, e.g. `ko` or `en`, for the language gate, the filters and the report; by default the adapter's, where
    it has one."""
    license: str | None = not_for(("cleaning",), None)
    """Licence of its rows, as model hubs write it, e.g. `CC-BY-4.0`; by default the adapter's, where it has one."""
    limit: int | None = not_for(("cleaning",), None, gt=0, le=LARGEST_SIZE)
    """Use at most this many kept records, in file order."""
    repeat: int = not_for(("cleaning",), 1, gt=0)
    """How often each record of the source is put into one epoch."""
    text_kind: Literal["ko", "en", "code", "any"] | None = None
    """Which filters clean its documents (`data.cleaning`); by default those of its language, and `any` has none."""
    weight: float | None = not_for(("cleaning", "data"), None, gt=0)
    """The source's part of an epoch, relative to the other sources' weights; with `data.mixing`, and then without `repeat`."""
    expect: int | None = neutral("check", None, ge=0, le=LARGEST_SIZE)
    """Number of records that should be kept (a published count); another number is warned about."""
    max_drop: float = neutral("check", 0.5, ge=0, le=1)
    """Refuse the source when a larger share of its rows is dropped; 0 refuses at the first bad row."""
    gates: dict[str, GateAction] = not_for(("cleaning",), default_factory=dict)
    """What the gates do (`keural.data.filtering.gates`), where that differs from the adapter's default: `{refusals: skip}`."""
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

    @field_validator("options")
    @classmethod
    def _text_keys(cls, options: dict[str, Any]) -> dict[str, Any]:
        return {name: _with_text_keys(value) if isinstance(value, dict) else value for name, value in options.items()}


def _with_text_keys(value: dict[Any, Any]) -> dict[str, Any]:
    """A map whose keys are texts, as its JSON has them: what YAML reads as numbers and truths, too."""
    found: dict[str, Any] = {}
    for key, item in value.items():
        text = json.dumps(key) if key is None or isinstance(key, int | float) else str(key)
        if text in found:
            raise ValueError(f"key {text} is there twice, as a text and not")
        found[text] = item
    return found


GATE_SETTINGS = ("gates", "min_characters", "max_characters", "max_length_ratio", "id_field", "id_space")
"""Settings of a source that say which of its records are used, by their content."""


class LicensesSpec(Spec):
    """Which licences a stage's data may have; patterns such as `*-NC-*`, case aside."""

    allow: list[str] = Field(default_factory=list)
    """Use only sources of these licences; one that states none is left out. Empty: all."""
    exclude: list[str] = Field(default_factory=list)
    """Leave out sources of these licences; `non-commercial`: all that forbid commercial use, `unknown`: those that state none."""


class MixingSpec(Spec):
    """How sources are mixed by their weights. An epoch is counted in what batches are: tokens, for dpo in pairs."""

    epoch: Annotated[int | Literal["scarcest"], BOUNDED] = "scarcest"
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
        if isinstance(epoch, int) and not 0 < epoch <= LARGEST_SIZE:
            raise ValueError(f"must be a number above 0 and at most {LARGEST_SIZE:,}, or scarcest")
        return epoch


class StoreSpec(Spec):
    """One of several token stores."""

    name: str = Field(min_length=1)
    """What tables and reports call the store."""
    path: str = Field(min_length=1)
    """Directory, relative to the recipe's data directory."""
    weight: float | None = Field(None, gt=0)
    """Its part of an epoch, relative to the other stores' weights; with `data.mixing`. Without, each is used once."""
    language: str | None = None
    """Language of its texts, for the report."""


class DecontaminateSpec(Spec):
    """Evaluation sets that training data must not hold; every kind of record is looked through, what is held out is not."""

    sources: list[SourceSpec] = Field(min_length=1)
    """The sets, each by its own adapter (`kobest_boolq`, `gsm8k`, ..) or by `evaluation` with the fields' names as options."""
    ngram: int = Field(13, ge=5)
    """Words of an item that must be found together; fewer when they are long (`keural.data.filtering.ngram_index`)."""
    min_share: float = Field(0.0, ge=0, le=1)
    """Share of an item's n-grams that must be found; 0: one is enough. Items that are found whole always count."""
    passages: bool = True
    """Look for the passages that questions are about, too; false keeps the articles that they were taken from."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        unused = {"limit", "repeat", "weight", "expect", "text_kind", *GATE_SETTINGS}
        for source in self.sources:
            if given := sorted(unused & source.model_fields_set):
                raise ValueError(
                    f"sources: {given[0]} of {source.name!r} has no effect; every item of an evaluation set is looked for"
                )
        return self


class ExecutorSpec(Spec):
    """Where cleaning runs: processes here, jobs on a Slurm cluster, or Ray."""

    kind: Literal["local", "slurm", "ray"] = "local"
    """Processes of this machine, jobs of a Slurm cluster, or Ray."""
    workers: int | None = Field(None, gt=0)
    """Tasks at a time; the default is one per core here, all at once on a cluster."""
    cpus_per_task: int = Field(1, gt=0)
    """CPU cores of one task (slurm, ray)."""
    mem_per_cpu_gb: int = Field(2, gt=0)
    """Memory of one task in GB for each of its cores (slurm, ray)."""
    partition: str | None = None
    """Partition of the Slurm cluster; slurm needs one."""
    time: str = "24:00:00"
    """Limit of a Slurm job."""
    qos: str | None = None
    """Quality of service of Slurm jobs; the default is the cluster's."""
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
    examples: int = neutral("report", 3, ge=0)
    """Dropped documents to show of each reason; a cleaning that is finished shows as many as it was asked for."""
    executor: ExecutorSpec = neutral("work", default_factory=ExecutorSpec)
    """Where cleaning runs."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if (self.language_id == "fasttext") != (self.model is not None):
            raise ValueError("language_id fasttext needs model, the file, and nothing else takes one")
        return self


class DataSpec(Spec):
    """A stage's data: sources or data that is tokenised already, length of a packed row, and what is held out."""

    sources: list[SourceSpec] = Field(default_factory=list)
    """Where rows are read from; they are checked, held out in part, tokenised and kept in a token store."""
    store: str | None = not_for(("data",), None)
    """Instead of sources: a token store, or a directory with `train/` and perhaps `heldout/`, as data was prepared before."""
    stores: list[StoreSpec] = not_for(("data",), default_factory=list)
    """Instead of sources: several token stores."""
    shards: str | None = not_for(("data",), None)
    """Instead of sources (next_token): a directory of published shards, `keural_NNN.bin`, `.idx` and `.meta`, as they are."""
    mixing: MixingSpec | None = not_for(("data",), None)
    """Mix sources or stores by weight. Stores that are mixed keep their sources apart; other weights need no other stores."""
    sequence_length: int = not_for(("data",), gt=1)
    """Tokens of a packed row (next_token, sft) or of one side of a pair with its prompt (dpo)."""
    train_on: Literal["assistant", "last_turn", "all"] = "assistant"
    """What of a conversation is trained (sft). `assistant`: the assistant's turns; `last_turn`: its last one alone, also after a
    cut at `sequence_length`; `all`: every turn. Turns that a row says are not trained are not trained in any case."""
    heldout_per_mille: float = Field(0.0, ge=0, lt=1000)
    """Share of records held out, chosen by a hash of their content."""
    heldout_sources: list[SourceSpec] = Field(default_factory=list)
    """Sources that are held out whole; they never enter training."""
    min_characters: int = Field(0, ge=0)
    """Drop documents shorter than this (next_token)."""
    licenses: LicensesSpec = Field(default_factory=LicensesSpec)
    """Sources are left out by licence, and shown as left out in the table."""
    cleaning: CleaningSpec | None = not_for(("data",), None)
    """Clean the documents of all sources first (next_token)."""
    benchmarks: bool = True
    """Train on sources that are benchmarks; false leaves them out."""
    decontaminate: DecontaminateSpec | None = None
    """Drop records that hold items of these evaluation sets (gate `contaminated`)."""

    @property
    def pretokenized(self) -> bool:
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
        if self.pretokenized:
            for name in (
                "train_on",
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
