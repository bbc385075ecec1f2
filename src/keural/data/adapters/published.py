"""Published sets by name: a usual shape with the set's field names, the keys a row must have, and rules for its known defects.

`SETS` is the table. A set with another name for a column, or a new set of a usual shape, is one more row of it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from keural.data.adapters import conversations, preferences
from keural.data.adapters.base import Adapter, BadRow, Reads, Undeclared, guarded, lookup, missing, scalar
from keural.data.adapters.judgements import label_key, number_of
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
    if None in [number_of(row[name], name) for name in ("score_chosen", "score_rejected")]:
        raise BadRow("missing_score")


def _not_found_wanting(row: Any) -> None:
    """Marks that the cleaned copies of orca_dpo_pairs carry: answers of equal worth, questions of the GSM8K training set."""
    if _known(row, "status", _STATUSES) == "tie":
        raise BadRow("score_tie")
    if _known(row, "in_gsm8k_train", _TRUTHS) in ("true", "1"):
        raise BadRow("in_gsm8k_train")


_STATUSES, _TRUTHS = ("tie", "swapped", "unchanged"), ("true", "false", "1", "0")


def _known(row: Any, name: str, values: tuple[str, ...]) -> str | None:
    """A mark of a row; None where it has none. Raises `Undeclared` for one that the set does not document."""
    found = label_key(row.get(name))
    if found is not None and found not in values:
        raise Undeclared(name, row[name], f"the set has {', '.join(values)}; mend the rows, or use adapter preference")
    return found


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

    def split(value: Any, source: SourceSpec) -> Iterable[Any]:
        assert shape.split is not None
        return shape.split(value, merged(source))

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
        split=None if shape.split is None else split,
        split_option=(lambda source: shape.splitter(merged(source)) is not None),
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
