"""Rows with several answers to one prompt: `hh_rlhf` (two transcripts) and `preference` (every other shape).

In: rows that say which answer is the better, by its field, a label, scores, ranks or an order. Out: preference pairs. What turns
hold is read by `turns.py`, what labels and scores mean by `judgements.py`. Everything that a row says of its prompt (a field, turns
inside its answers, a system text beside them) must agree, or the row is dropped.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from keural.data.adapters.base import (
    TABLES,
    Adapter,
    BadRow,
    Reads,
    described,
    guarded,
    holds,
    lookup,
    missing,
    normalized,
    placeholder_free,
    plain,
    preference_pair,
    scalar,
    text_of,
    trimmed,
    with_system,
)
from keural.data.adapters.judgements import (
    FIRST,
    LABELS,
    POLICIES,
    UNRANKED,
    check_labels,
    check_order,
    meaning_of,
    number_of,
    ranked_pairs,
    said,
)
from keural.data.adapters.turns import (
    CONTENT_KEYS,
    INPUT_LEFT_OUT,
    ITEMS_LEFT_OUT,
    REASONING_LEFT_OUT,
    ROLE_KEYS,
    TURN_OPTIONS,
    TurnReader,
    check_flags,
    check_roles,
    listing,
    one_of,
    reads,
)
from keural.data.readers.options import LIST, MAP, NAME, NAMES, NUMBER, SWITCH, TEXT, Option, OptionTable
from keural.data.records import Drop, PreferencePair
from keural.recipe import SourceSpec
from keural.tokenizer.message import Message, with_tools

PROMPT_FIELDS = ("prompt", "question", "instruction", "conversations", "messages")
"""Fields of which one holds the prompt; `input` belongs to an instruction, and is the prompt where there is none."""
ANSWER_KEYS = ("text", "content", "response", "completion", "answer", "output")
"""Fields of an answer that is an object, of which one holds its text."""
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("rating_chosen", "rating_rejected"),
    ("reward_chosen", "reward_rejected"),
    ("chosen_reward", "rejected_reward"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)
"""Scores beside chosen and rejected, as public sets name them; higher is better."""
ORDERS = ("best_first", "worst_first")
HISTORY_TRAINED = "history_not_trained"
"""Noted of pairs whose row says that a turn before the answers is trained."""
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLE_MARKER = re.compile(r"\b(?:Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_IGNORED = "where they mean something else, name them in the option ignore"


def _hh_rlhf(value: Any, source: SourceSpec, where: str) -> PreferencePair | Drop:
    """Two transcripts of `\\n\\nHuman: ..\\n\\nAssistant: ..` that share everything but the last answer."""
    chosen, rejected = (transcript(text_of(value, side)) for side in ("chosen", "rejected"))
    if chosen[-1].role != "assistant" or rejected[-1].role != "assistant":
        raise BadRow("ends_with_user")
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("history_differs")
    return preference_pair(chosen[:-1], chosen[-1].content, rejected[-1].content, where, source.language)


def transcript(text: str) -> list[Message]:
    """The turns of a transcript. Raises `BadRow` for text before the first turn, an empty turn, turns that do not alternate, and a
    role's name and colon inside a turn.
    """
    before, *parts = _TURN.split(text)
    if before.strip() or not parts:
        raise BadRow("text_before_first_turn")
    turns = [Message(_HH_ROLES[role], content.strip()) for role, content in zip(parts[::2], parts[1::2], strict=True)]
    if any(turn.role != ("user", "assistant")[place % 2] for place, turn in enumerate(turns)):
        raise BadRow("not_alternating")
    if any(not turn.content for turn in turns):
        raise BadRow("empty_turn")
    if any(_ROLE_MARKER.search(turn.content) for turn in turns):
        raise BadRow("role_marker_in_turn")
    return turns


class Judged(NamedTuple):
    """Two answers as the row has them, the better one first."""

    chosen: Any
    rejected: Any
    names: tuple[str, str]
    """The fields that they are from."""
    label: str = ""
    """What the row's label says, where one decides."""
    weight: float = 1.0
    """One for each prompt, shared by its pairs."""
    notes: tuple[str, ...] = ()


class JudgedRow(dict[Any, Any]):
    """A row with one of its pairs."""

    judged: Judged


def _preference(value: Any, source: SourceSpec, where: str) -> PreferencePair | Drop:
    """`{prompt, chosen, rejected}` or `{prompt, answers with a label, scores, ranks or in order}`.

    Answers are texts, messages, lists of messages that begin with the prompt (also as JSON text), or objects with a text (option
    `content` names it). The prompt is a text or a list of messages in `prompt`, `question`, `instruction` (and `input`),
    `conversations` or `messages`; `system` and `tools` stand beside it. Options of these names give other fields; `prompt_text` is
    a prompt that all rows share and none holds; `booleans` is how answers that are true and false are written: `[예, 아니요]`.

    `answers: [a, b]` with `label` are two answers, and which is the better: 1 or 2, or what option `labels` says, such as
    `{A: first, B: second, both: tie, unsure: none}`. `answers` with `scores` are two or more (fields, or one field that holds a
    list of texts or objects) with a number for each, higher is better unless `lower_is_better: true`; with `order: best_first` they
    stand in order. Ranked answers give the pairs that `pairs` says, best_vs_worst by default, weighted so that each prompt counts
    once; of lists of chosen and rejected answers `pairs: all` takes each with each. `min_margin` is the least difference of scores.
    """
    reader, options = TurnReader(source, where, has_turns=False), source.options
    reader.check_row(value, _judging_fields(options))
    judged = value.judged if isinstance(value, JudgedRow) else next(_judgements(value, source))
    if isinstance(judged, BadRow):
        raise judged
    (history, chosen), (rejected_history, rejected) = (
        _answer(answer, name, reader) for answer, name in zip(judged[:2], judged.names, strict=True)
    )
    if _content_of(history) != _content_of(rejected_history):
        raise BadRow("history_differs")
    prompt = _prompt(value, reader, history, chosen)
    if not prompt:
        raise BadRow("missing_prompt")
    prompt = with_tools(with_system(reader.system(value), prompt), reader.tools(value))
    if REASONING_LEFT_OUT in reader.notes:
        raise BadRow("has_reasoning")
    notes = (*judged.notes, *((HISTORY_TRAINED,) if any(turn.trained for turn in prompt) else ()))
    notes += (INPUT_LEFT_OUT,) if INPUT_LEFT_OUT in reader.notes else ()
    prompt = [turn._replace(trained=None) for turn in prompt]
    pair = preference_pair(prompt, chosen.content, rejected.content, where, source.language)
    return pair if isinstance(pair, Drop) else replace(pair, label=judged.label, weight=judged.weight, notes=notes)


def _judging_fields(options: Mapping[str, Any]) -> list[Any]:
    """Fields that say which answer is the better, where the options make them say it."""
    if "answers" not in options or "order" in options:
        return [options["label"]] if "label" in options else []
    return [options["scores"]] if "scores" in options else [options.get("label", "label")]


def _pairs_of(value: Any, source: SourceSpec) -> Iterator[Any]:
    """The row once for each of its pairs, or what is wrong with them."""
    for judged in _judgements(value, source):
        if isinstance(judged, BadRow) or not isinstance(value, dict):
            yield judged if isinstance(judged, BadRow) else value
        else:
            row = JudgedRow(value)
            row.judged = judged
            yield row


def _judgements(row: Any, source: SourceSpec) -> Iterator[Judged | BadRow]:
    """The pairs of a row."""
    options = source.options
    try:
        if "answers" not in options:
            yield from _sides(row, options)
        elif "scores" in options or "order" in options:
            yield from _ranked(row, options)
        else:
            yield _labelled(row, options)
    except BadRow as bad:
        yield bad


def _sides(row: Any, options: Mapping[str, Any]) -> Iterator[Judged]:
    names = (options.get("chosen", "chosen"), options.get("rejected", "rejected"))
    _check_scores(row, options)
    chosen, rejected = (lookup(row, name) for name in names)
    if chosen is None and rejected is None and not (isinstance(row, dict) and any(str(name) in row for name in names)):
        raise missing(row, *map(str, names), hint=_kto_hint(row))
    texts = (str(names[0]), str(names[1]))
    if "pairs" not in options:
        yield Judged(chosen, rejected, texts, notes=_items_left(row, texts))
        return
    sides = [_several(chosen, options), _several(rejected, options)]
    if not all(sides):
        raise BadRow(f"missing_{texts[0] if not sides[0] else texts[1]}")
    weight = 1 / (len(sides[0]) * len(sides[1]))
    for better in sides[0]:
        for worse in sides[1]:
            yield Judged(better, worse, texts, weight=weight)


def _kto_hint(row: Any) -> str:
    alone = isinstance(row, dict) and {"completion", "label"} <= row.keys()
    return (
        "; one answer with a label is no pair: adapter kto trains the good ones, with objective kto the bad ones, too"
        if alone
        else ""
    )


def _check_scores(row: Any, options: Mapping[str, Any]) -> None:
    """Scores beside chosen and rejected must prefer the chosen one."""
    ignored = set(map(str, options.get("ignore", ())))
    wanted: Sequence[tuple[Any, ...]] = [tuple(options["scores"])] if "scores" in options else SCORES
    found = 0
    for names in wanted:
        if ignored.intersection(map(str, names)) or (wanted is SCORES and isinstance(row, dict) and row.keys().isdisjoint(names)):
            continue
        numbers = [number_of(lookup(row, name), name, f"scores are numbers; {_IGNORED}") for name in names]
        if None not in numbers:
            better, worse = (_signed(float(number or 0), options) for number in numbers)
            check_order(better, worse, options.get("min_margin", 0))
            found += 1
        elif any(number is not None for number in numbers) or "scores" in options:
            raise BadRow(
                "missing_score", " or ".join(str(name) for name, number in zip(names, numbers, strict=True) if number is None)
            )
    if not found and "min_margin" in options:
        raise BadRow("missing_score")


def _signed(number: float, options: Mapping[str, Any]) -> float:
    """A score of which higher is better."""
    return -number if options.get("lower_is_better") else number


def _labelled(row: Any, options: Mapping[str, Any]) -> Judged:
    answers, names = _answers(row, options)
    if len(answers) != 2:
        raise BadRow("not_two_answers", f"{len(answers)} answers")
    field = options.get("label", "label")
    value = lookup(row, field)
    chosen = 0 if meaning_of(value, field, options.get("labels"), names) == FIRST else 1
    pair = (names[chosen], names[1 - chosen])
    return Judged(answers[chosen], answers[1 - chosen], pair, said(field, value), notes=_items_left(row, names))


def _ranked(row: Any, options: Mapping[str, Any]) -> Iterator[Judged | BadRow]:
    answers, names = _answers(row, options)
    if "order" in options:
        best_first = options["order"] == ORDERS[0]
        scores: list[float | None] = [float(-place if best_first else place) for place in range(len(answers))]
    else:
        scores = _scores(row, options, answers)
    scored = [place for place, score in enumerate(scores) if score is not None]
    if len(scored) < 2:
        raise BadRow("missing_ranking", f"{len(scored)} of {len(answers)} answers")
    left = any(score is None and holds(answer) for score, answer in zip(scores, answers, strict=True))
    numbers = [_signed(float(scores[place] or 0), options) for place in scored]
    pairs: list[tuple[int, int]] = []
    for better, worse in ranked_pairs(numbers, options.get("pairs", POLICIES[0])):
        try:
            check_order(numbers[better], numbers[worse], options.get("min_margin", 0))
            pairs.append((scored[better], scored[worse]))
        except BadRow as bad:
            yield bad
    for first, second in pairs:
        notes = (*((UNRANKED,) if left else ()), *_items_left(row, names))
        label = f"{names[first]} is the better" if len(answers) == 2 and "scores" in options else ""
        yield Judged(answers[first], answers[second], (names[first], names[second]), label, 1 / len(pairs), notes)


def _answers(row: Any, options: Mapping[str, Any]) -> tuple[list[Any], list[str]]:
    """The answers of a row, with what each is called."""
    given = options["answers"]
    if isinstance(given, list) and len(given) > 1:
        return [lookup(row, name) for name in given], [str(name) for name in given]
    name = given[0] if isinstance(given, list) else given
    found = listing(lookup(row, name))
    if not isinstance(found, list):
        raise BadRow(f"missing_{name}") if found is None else BadRow("malformed_row", f"{name} is a {type(found).__name__}")
    return found, [f"{name}.{place}" for place in range(len(found))]


def _items_left(row: Any, names: Sequence[str]) -> tuple[str, ...]:
    """The note of a row of which names such as `answers.0` and `answers.1` take some items of a list that has more."""
    taken: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for place, part in enumerate(parts):
            if place and part.isdecimal():
                taken.setdefault(".".join(parts[:place]), set()).add(part)
    lists = ((plain(lookup(row, name)), places) for name, places in taken.items())
    return (ITEMS_LEFT_OUT,) if any(isinstance(found, list) and len(found) > len(places) for found, places in lists) else ()


def _scores(row: Any, options: Mapping[str, Any], answers: Sequence[Any]) -> list[float | None]:
    """The score of each answer: in fields of their own, in a list beside the answers, or inside them."""
    given = options["scores"]
    if isinstance(given, list) and len(given) > 1:
        return [number_of(lookup(row, name), name) for name in given]
    name = given[0] if isinstance(given, list) else given
    beside = listing(lookup(row, name))
    inside = [lookup(answer, name) for answer in map(listing, answers)] if all(isinstance(a, dict) for a in answers) else []
    if not holds(beside):
        return [number_of(each, name) for each in inside] if inside else [None] * len(answers)
    if not isinstance(beside, list) or len(beside) != len(answers):
        size = f"{len(beside)} scores" if isinstance(beside, list) else f"{name} is a {type(beside).__name__}"
        raise BadRow("malformed_row", f"{len(answers)} answers, {size}")
    numbers = [number_of(each, name) for each in beside]
    if any(map(holds, inside)) and [number_of(each, name) for each in inside] != numbers:
        raise BadRow("fields_differ", f"{name} beside the answers, inside them")
    return numbers


def _several(value: Any, options: Mapping[str, Any]) -> list[Any]:
    """The answers that a field holds."""
    found = listing(value)
    if _turns_in(value, options) is not None or not isinstance(found, list) or isinstance(value, str):
        return [] if value is None else [value]
    return found


def _turns_in(value: Any, options: Mapping[str, Any]) -> list[Any] | None:
    """The turns that a value is: a list of objects with a role, or one of them, also as JSON text; None for anything else."""
    found = listing(value)
    keys = [str(options["role"])] if "role" in options else ROLE_KEYS
    items = found if isinstance(found, list) else [found]
    return items if items and all(isinstance(item, dict) and any(key in item for key in keys) for item in items) else None


def _answer(value: Any, name: str, reader: TurnReader) -> tuple[list[Message], Message]:
    """Turns before an answer, if it comes with them, and the answer."""
    turns = _turns_in(value, reader.options)
    if turns is not None:
        messages = reader.turns(turns)
        if messages[-1].role != "assistant":
            raise BadRow("ends_with_user")
        if messages[-1].trained is False:
            raise BadRow("not_trained", name)
        return messages[:-1], messages[-1]
    found = value if isinstance(value, str) else listing(value)
    answer: dict[str, Any] | None = None
    if isinstance(found, list) and len(found) > 1:
        raise BadRow("several_answers", f"{name} holds {len(found)}")
    if isinstance(found, list) and found:
        return _answer(found[0], name, reader)
    if isinstance(found, dict):
        key, answer = reader.options.get("content"), found
        found, name = (lookup(found, key), f"{name}.{key}") if key is not None else (one_of(found, ANSWER_KEYS), name)
    if not (holds(found) or found == "") or found != found:  # NaN is nothing
        raise BadRow(f"missing_{name}")
    booleans = reader.options.get("booleans")
    text = booleans[not found] if booleans and isinstance(found, bool) else scalar(found)
    if text is None:
        raise BadRow(f"{name}_is_not_text", type(found).__name__)
    message = Message("assistant", text) if answer is None else reader.with_extras(Message("assistant", text), answer)
    if message.trained is False:
        raise BadRow("not_trained", name)
    return [], message


def _prompt(row: Any, reader: TurnReader, history: list[Message], chosen: Message) -> list[Message]:
    """The turns before the answer, from wherever the row has them. Raises `BadRow` where two places say different things."""
    options = reader.options
    fields = {str(name): _prompt_field(row, name, reader) for name in _prompt_names(row, options)}
    if "prompt_text" in options:
        fields["prompt_text"] = [Message("user", options["prompt_text"])]
    places = {name: _without_answer(turns, chosen) for name, turns in fields.items()}
    longest = history or max(places.values(), key=len, default=[])
    if any(not _begins_with(longest, turns) for turns in places.values()):
        raise BadRow("history_differs" if history else "fields_differ", ", ".join(places))
    if history:
        places["history"] = history
    systems = [turns[0] for turns in places.values() if turns and turns[0].role == "system" and turns[0].content.strip()]
    if len({normalized(system.content) for system in systems}) > 1:
        raise BadRow("system_differs", ", ".join(places))
    return [*systems[:1], *_spoken(longest)]


def _prompt_names(row: Any, options: Mapping[str, Any]) -> list[Any]:
    if "prompt" in options:
        return [options["prompt"]]
    ignored = set(map(str, options.get("ignore", ())))
    names = [name for name in PROMPT_FIELDS if name not in ignored and holds(lookup(row, name))]
    alone = "instruction" not in names and "input" not in options and "input" not in ignored
    return [*names, "input"] if alone and _has_input(row, "input") else names


def _has_input(row: Any, name: Any) -> bool:
    found = lookup(row, name)
    return bool(placeholder_free(found).strip()) if isinstance(found, str) else holds(found)


def _prompt_field(row: Any, name: Any, reader: TurnReader) -> list[Message]:
    options = reader.options
    with_input = "input" in options or name == "instruction"
    given = reader.optional_input(text_of(row, options.get("input", "input"), required=False)) if with_input else ""
    turns = None if isinstance(name, list) else _turns_in(lookup(row, name), options)
    if turns is not None:
        if given:
            raise BadRow("fields_differ", f"{name} holds turns, and there is an input")
        return reader.turns(turns)
    text = trimmed(text_of(row, name))
    return [Message("user", f"{text}\n\n{given}" if given else text)]


def _without_answer(turns: list[Message], chosen: Message) -> list[Message]:
    """The turns without the chosen answer, where they end with it."""
    ends = len(turns) > 1 and turns[-1].role == "assistant" and normalized(turns[-1].content) == normalized(chosen.content)
    return turns[:-1] if ends else turns


def _spoken(turns: list[Message]) -> list[Message]:
    return turns[1:] if turns and turns[0].role == "system" else turns


def _begins_with(longest: list[Message], turns: list[Message]) -> bool:
    """Whether turns are the beginning of others, system turns aside."""
    first, all_turns = _content_of(_spoken(turns)), _content_of(_spoken(longest))
    return all_turns[: len(first)] == first


def _content_of(turns: list[Message]) -> list[tuple[str, str]]:
    return [(turn.role, normalized(turn.text)) for turn in turns]


def _takes_apart(source: SourceSpec) -> bool:
    """Whether a row may give several pairs."""
    answers = source.options.get("answers", ["", ""])
    return "pairs" in source.options or not isinstance(answers, list) or len(answers) != 2


NEEDS: dict[str, tuple[str, ...]] = {
    "label": ("answers",),
    "labels": ("answers",),
    "order": ("answers",),
    "lower_is_better": ("scores",),
}
"""Options that have no effect without others."""
EXCLUDE: dict[str, tuple[str, ...]] = {
    "chosen": ("answers",),
    "rejected": ("answers",),
    "label": ("scores", "order"),
    "labels": ("scores", "order"),
    "scores": ("order",),
    "min_margin": ("order", "label", "labels"),
    "prompt_text": ("prompt", "input"),
}
"""Options that have no effect beside others."""


def _check(source: SourceSpec) -> str | None:
    """What is wrong with the options together."""
    options = source.options
    for name, others in NEEDS.items():
        if name in options and not any(other in options for other in others):
            return f"option {name!r} has no effect without {' or '.join(map(repr, others))}"
    for name, others in EXCLUDE.items():
        if name in options and (given := [other for other in others if other in options]):
            return f"option {name!r} has no effect beside {given[0]!r}"
    return check_flags(source) or check_roles(source) or _check_answers(options) or _check_values(options) or _check_apart(options)


def _check_apart(options: Mapping[str, Any]) -> str | None:
    """A field that a recipe names as the prompt and as an answer, or as both answers."""
    answers = options["answers"] if "answers" in options else [options.get(side, side) for side in ("chosen", "rejected")]
    prompt = options.get("prompt", [])
    named = [*(answers if isinstance(answers, list) else [answers]), *(prompt if isinstance(prompt, list) else [prompt])]
    twice = [name for name, count in Counter(map(str, named)).items() if count > 1]
    return f"field {twice[0]!r} is named as two of prompt and answers" if twice else None


def _check_answers(options: Mapping[str, Any]) -> str | None:
    answers, scores = options.get("answers"), options.get("scores")
    ranked = "scores" in options or "order" in options
    if answers is None:
        if "pairs" in options and options["pairs"] != "all":
            return "option 'pairs': chosen and rejected stand in no order, so only all takes pairs of several; others need answers"
        if scores is not None and (not isinstance(scores, list) or len(scores) != 2):
            return "option 'scores' must be two fields, of the chosen and of the rejected answer; others need answers"
        return None
    names = answers if isinstance(answers, list) else [answers]
    if len(names) > 2 and not ranked:
        return "option 'answers': a label says which of two answers is better; more need scores or order"
    if len(set(map(str, names))) < len(names):
        return f"option 'answers' names a field twice: {', '.join(map(str, names))}"
    if isinstance(scores, list) and len(scores) > 1 and len(scores) != len(names):
        return f"option 'scores' must be a field for each of {len(names)} answers, or one, got {len(scores)}"
    if len(names) > 1 and scores is not None and not (isinstance(scores, list) and len(scores) > 1):
        return f"option 'scores' must be a field for each of the answers {', '.join(map(str, names))}"
    if "pairs" in options and (not ranked or len(names) == 2):
        return "option 'pairs' has no effect: two answers give one pair"
    return None


def _check_values(options: Mapping[str, Any]) -> str | None:
    if "labels" in options and (problem := check_labels(options["labels"])):
        return problem
    if "booleans" in options and (len(options["booleans"]) != 2 or not all(isinstance(text, str) for text in options["booleans"])):
        return f"option 'booleans' must be two texts, for true and for false, got {options['booleans']!r}"
    if not options.get("prompt_text", "x").strip():
        return "option 'prompt_text' is empty"
    if not 0 < options.get("min_margin", 1) < float("inf"):
        return f"option 'min_margin' must be a number above 0, got {options['min_margin']!r}"
    return None


def _reads(source: SourceSpec) -> Reads:
    options = source.options
    prompts = [options["prompt"]] if "prompt" in options else [*PROMPT_FIELDS, "input"]
    if "answers" in options:
        answers = options["answers"] if isinstance(options["answers"], list) else [options["answers"]]
    else:
        answers = [options.get("chosen", "chosen"), options.get("rejected", "rejected")]
    scores = [] if "answers" in options else [name for names in SCORES for name in names]
    scores = options.get("scores", scores)
    keys = [*prompts, scores, *_judging_fields(options), *([options["input"]] if "input" in options else [])]
    keys += ["input"] if "instruction" in map(str, prompts) else []
    turns = [*answers, *(name for name in prompts if not isinstance(name, list))]
    read = reads(source, keys, turns, ["input"])
    inside = ANSWER_KEYS if "content" not in options else ()
    score_keys = map(str, scores if isinstance(scores, list) else [scores])
    return replace(read, turn_keys=read.turn_keys | {*inside, *score_keys}, optional=("system", "tools", "flags", "input"))


OPTIONS: OptionTable = {
    "prompt": Option(NAMES, "field with the text or the turns before the answers", (*PROMPT_FIELDS, "input")),
    "prompt_text": Option(TEXT, "prompt that all rows share and none of them holds"),
    "input": Option(NAMES, "field with what an instruction is asked of, put below it", "input"),
    **{name: TURN_OPTIONS[name] for name in ("system", "tools", "flags", "ignore")},
    "chosen": Option(NAME, "field with the better answer", "chosen"),
    "rejected": Option(NAME, "field with the worse answer", "rejected"),
    "answers": Option(NAMES, "fields with an answer each, or one with a list of them, instead of chosen and rejected"),
    "label": Option(NAME, "field that says which of two answers is the better", "label"),
    "labels": Option(
        MAP,
        "what each value of the label means: first, second, tie or none; any other value refuses the source",
        {int(value): meaning for value, meaning in LABELS.items()},
    ),
    "scores": Option(
        NAMES,
        "fields with a number for each answer, or one with a list of them or inside the answers; beside chosen and rejected two "
        "fields, which must prefer the chosen one",
        tuple(name for names in SCORES for name in names),
    ),
    "lower_is_better": Option(SWITCH, "the scores are ranks or losses: the lower is the better", False),
    "min_margin": Option(NUMBER, "rows whose scores differ by less are dropped"),
    "order": Option(TEXT, "the answers stand in order, and no field scores them", choices=ORDERS),
    "pairs": Option(
        TEXT,
        "which pairs several answers give: the best with the worst, each with the next worse, or all; all alone, where several are "
        "chosen or rejected; pairs of one row share its weight in the loss",
        "best_vs_worst",
        POLICIES,
    ),
    "booleans": Option(LIST, "two texts: how answers that are true and false are written"),
    "content": Option(NAME, "field of a turn, or of an answer that is an object, with its text", (*CONTENT_KEYS, *ANSWER_KEYS)),
    "role": TURN_OPTIONS["role"],
    "roles": Option(MAP, "what names of roles stand for (system, user, assistant, tool, tool_call), beside the usual names"),
}
_TWO = {"prompt": "Name a tree.", "chosen": "An oak.", "rejected": "A spoon."}
ADAPTERS = {
    # to refuse is what its harmless part teaches
    "hh_rlhf": Adapter(
        "pairs",
        guarded(_hh_rlhf),
        TABLES,
        meaning=described(_hh_rlhf),
        reads=lambda source: Reads(frozenset(("chosen", "rejected"))),
        example={
            "chosen": "\n\nHuman: Name a tree.\n\nAssistant: An oak.",
            "rejected": "\n\nHuman: Name a tree.\n\nAssistant: A spoon.",
        },
        license="MIT",
        gates={"refusals": "count"},
    ),
    "preference": Adapter(
        "pairs",
        guarded(_preference),
        TABLES,
        OPTIONS,
        described(_preference),
        split=_pairs_of,
        split_option=_takes_apart,
        check=_check,
        reads=_reads,
        example=_TWO,
    ),
}
