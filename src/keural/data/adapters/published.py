"""Published sets by name: a usual shape with the set's field names, the keys a row must have, and rules for its known defects.

`SETS` is the table. A set with another name for a column, or a new set of a usual shape, is one more row of it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from keural.data.adapters import conversations, preferences
from keural.data.adapters.base import Adapter, BadRow, Reads, guarded, lookup, missing, scalar
from keural.data.records import Conversation, Drop, PreferencePair, Record
from keural.recipe import GateAction, SourceSpec

Rule = Callable[[Any], None]
"""Raises `BadRow` for a row with a defect that the set is known for."""
_SHAPES = {**conversations.ADAPTERS, **preferences.ADAPTERS}


@dataclass(frozen=True)
class PublishedSet:
    """One published set."""

    shape: str
    """The adapter that reads rows of this shape."""
    keys: tuple[tuple[str, ...], ...]
    """Of each group a row must have one key; otherwise it is of another set."""
    options: dict[str, Any] = field(default_factory=dict)
    license: str | None = None
    rules: tuple[Rule, ...] = ()
    gates: dict[str, GateAction] = field(default_factory=dict)


def _ends_with_assistant(row: Any) -> None:
    """The `*_gen` splits of UltraChat end with a user turn: they are prompts, not examples."""
    turns = row["messages"]
    if isinstance(turns, list) and turns and isinstance(turns[-1], dict) and turns[-1].get("role") == "user":
        raise BadRow("ends_with_user")


def _begins_with_prompt(row: Any) -> None:
    prompt, first = scalar(row.get("prompt")), lookup(row, "messages.0")
    if isinstance(first, dict) and first.get("role") == "system":
        first = lookup(row, "messages.1")
    if prompt and (scalar(lookup(first, "content")) or "").strip() != prompt.strip():
        raise BadRow("prompt_differs")


def _has_system(row: Any) -> None:
    """Both answers are good; only the system turn makes one of them the better."""
    if not (scalar(row["system"]) or "").strip():
        raise BadRow("missing_system")


def _has_scores(row: Any) -> None:
    scores = (row["score_chosen"], row["score_rejected"])
    if not all(isinstance(score, int | float) and not isinstance(score, bool) for score in scores):
        raise BadRow("missing_score")


def _not_found_wanting(row: Any) -> None:
    """Marks that the cleaned copies of orca_dpo_pairs carry: answers of equal worth, questions of the GSM8K training set."""
    if row.get("status") == "tie":
        raise BadRow("score_tie")
    if row.get("in_gsm8k_train") is True:
        raise BadRow("in_gsm8k_train")


RULED = frozenset(("prompt", "status", "in_gsm8k_train"))
"""Fields that rules look at."""
_PAIR = (("chosen",), ("rejected",))
SETS = {
    "openhermes": PublishedSet("sharegpt", (("conversations",),), {"system": "system_prompt"}),
    "slimorca": PublishedSet("sharegpt", (("conversations",),), license="MIT"),
    "openorca": PublishedSet(
        "qa",
        (("question",), ("response",)),
        {"system": "system_prompt", "question": "question", "answer": "response"},
        license="MIT",
    ),
    "ultrachat_200k": PublishedSet(
        "messages", (("messages",), ("prompt",)), license="MIT", rules=(_ends_with_assistant, _begins_with_prompt)
    ),
    "stanford_alpaca": PublishedSet("alpaca", (("instruction",), ("output",)), license="CC-BY-NC-4.0"),
    # questions of a public forum: links and what people wrote about themselves
    "koalpaca": PublishedSet("alpaca", (("instruction",), ("output",)), gates={"personal_data": "drop"}),
    "koinstruct_base": PublishedSet("alpaca", (("instruction",), ("output",))),
    "koinstruct_qa": PublishedSet("alpaca", (("instruction",), ("output",)), gates={"duplicate_prompts": "drop"}),
    "multifaceted_collection_dpo": PublishedSet(
        "preference", (("system",), ("prompt",), *_PAIR), license="CC-BY-4.0", rules=(_has_system,)
    ),
    "ultrafeedback_binarized": PublishedSet(
        "preference", (("prompt",), *_PAIR, ("score_chosen",), ("score_rejected",)), license="MIT", rules=(_has_scores,)
    ),
    "ko_ultrafeedback_binarized": PublishedSet("preference", (("prompt",), *_PAIR)),
    "orca_dpo_pairs": PublishedSet(
        "preference", (("question", "prompt"), *_PAIR), license="Apache-2.0", rules=(_not_found_wanting,)
    ),
    "orca_dpo_pairs_ko": PublishedSet("preference", (("question", "prompt", "instruction"), *_PAIR), rules=(_not_found_wanting,)),
}


def _adapter(known: PublishedSet) -> Adapter:
    shape = _SHAPES[known.shape]

    def convert(value: Any, source: SourceSpec, where: str) -> Record | Drop:
        if not source.options:  # with options the row's names are the user's business
            _check_keys(value, known.keys)
        if isinstance(value, dict):
            _check_rules(value, known.rules)
        named = source if not known.options else source.model_copy(update={"options": known.options | source.options})
        record = shape(value, named, where)
        assert isinstance(record, Conversation | PreferencePair | Drop)
        return record

    def merged(source: SourceSpec) -> SourceSpec:
        return source.model_copy(update={"options": known.options | source.options})

    def reads(source: SourceSpec) -> Reads:
        assert shape.reads is not None
        read = shape.reads(merged(source))
        return replace(read, keys=read.keys | {key for group in known.keys for key in group} | RULED)

    return replace(
        shape,
        convert=guarded(convert),
        meaning=f"The set as published: rows of adapter `{known.shape}`{_defects(known)}.",
        license=known.license,
        gates=known.gates,
        check=None if shape.check is None else lambda source: shape.check(merged(source)),  # type: ignore[misc]
        reads=None if shape.reads is None else reads,
        example=None,
    )


def _defects(known: PublishedSet) -> str:
    return ", without those with the defects that it is known for" if known.rules else ""


def _check_keys(value: Any, keys: Iterable[tuple[str, ...]]) -> None:
    for group in keys:
        if not isinstance(value, dict) or not any(key in value for key in group):
            raise missing(value, *group)


def _check_rules(value: dict[str, Any], rules: Iterable[Rule]) -> None:
    for rule in rules:
        try:
            rule(value)
        except KeyError as absent:
            raise missing(value, str(absent.args[0])) from absent


ADAPTERS = {name: _adapter(known) for name, known in SETS.items()}
