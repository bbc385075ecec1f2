"""Rows that are dialogues: `messages` (ChatML), `sharegpt`, `prompt_completion`, `kto`, `alpaca`, `qa`, `squad`, `dialogue`.

In: rows with turns, or with a question and an answer. Out: conversations. What turns hold and what of them is trained is read by
`turns.py`; every adapter here takes its options (`ROW_OPTIONS`, those with turns `TURN_OPTIONS`), and `unfold`, which takes rows
apart that hold lists of records.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from keural.data.adapters.base import (
    TABLES,
    Adapter,
    BadRow,
    Reads,
    Undeclared,
    described,
    document,
    guarded,
    holds,
    lookup,
    plain,
    scalar,
    text_of,
    trimmed,
)
from keural.data.adapters.turns import (
    NO,
    REASONING,
    ROW_OPTIONS,
    TURN_OPTIONS,
    YES,
    TurnReader,
    check_label_is_read,
    check_row_options,
    check_turns,
    listing,
    reads,
)
from keural.data.readers.options import LIST, NAME, NAMES, TEXT, Option, OptionTable
from keural.data.records import Conversation, Drop
from keural.recipe import SourceSpec
from keural.tokenizer.message import Message

SQUAD_LISTS = ("data", "paragraphs", "qas")
_SLOT = re.compile(r"\{(\w+)\}")
"""What a template asks to be filled."""


def _messages(value: Any, source: SourceSpec, where: str) -> Conversation | Drop:
    """`{messages: [{role, content}, ..]}`; option `field` names the list. An item may be a round, `{human: .., assistant: ..}`."""
    return _listed(value, source, where, "messages")


def _sharegpt(value: Any, source: SourceSpec, where: str) -> Conversation | Drop:
    """`{conversations: [{from, value}, ..]}`; options as for `messages`."""
    return _listed(value, source, where, "conversations")


def _listed(value: Any, source: SourceSpec, where: str, field: str) -> Conversation | Drop:
    reader, name = TurnReader(source, where), source.options.get("field", field)
    reader.check_row(value, [name])
    if not isinstance(value, dict):
        return reader.conversation(value, reader.turns(value if isinstance(plain(value), list) else None))
    found = lookup(value, name)
    if found is None:
        raise BadRow("missing_messages", _keys(value))
    return reader.conversation(value, reader.turns(found))


def _keys(value: dict[str, Any]) -> str:
    return f"its keys: {', '.join(sorted(map(str, value))[:12]) or 'none'}"


def _prompt_completion(value: Any, source: SourceSpec, where: str) -> Conversation | Drop:
    """`{prompt, completion}`, each a text or a list of messages; options of these names give other fields. Only the completion is
    trained.
    """
    return _completed(TurnReader(source, where), value)


def _kto(value: Any, source: SourceSpec, where: str) -> Conversation | Drop:
    """`{prompt, completion, label}`: as `prompt_completion`, and the label says whether the completion is a good one; only good
    ones are learned, with objective kto bad ones, too.
    """
    reader, name = TurnReader(source, where), source.options.get("label", "label")
    good = reader.label(lookup(value, name), name, required=True)
    if good is None and not reader.source.as_labels:  # there, the completion may have it
        raise BadRow("missing_label")
    reader.judge(good, name, lookup(value, name))
    return _completed(reader, value, name)


def _completed(reader: TurnReader, value: Any, *read: str | int) -> Conversation | Drop:
    names = _names(reader.options, "prompt", "completion")
    reader.check_row(value, [*names, *read])
    prompt, completion = (_side(reader, value, name, role) for name, role in zip(names, ("user", "assistant"), strict=True))
    if not prompt or prompt[-1].role not in ("user", "tool"):
        raise BadRow("prompt_does_not_end_with_user")
    if not completion or completion[0].role != "assistant":
        raise BadRow("completion_does_not_begin_with_assistant")
    if reader.source.as_labels and len(completion) > 1:
        raise BadRow("label_of_several_turns")
    completion[-1] = reader.reasoned(completion[-1], value)
    given = [turn._replace(trained=bool(turn.trained)) if turn.role == "assistant" else turn for turn in prompt]
    return reader.conversation(value, [*given, *completion])


def _side(reader: TurnReader, value: Any, name: str | int, role: str) -> list[Message]:
    """The turns of a prompt or completion, which may be a text."""
    found = lookup(value, name)
    turns = listing(found)
    if isinstance(turns, list) and (not isinstance(found, str) or all(isinstance(turn, dict) for turn in turns)):
        return reader.turns(turns)
    return [Message(role, trimmed(text_of(value, name)))]


def _alpaca(value: Any, source: SourceSpec, where: str) -> Conversation | Drop:
    """`{instruction, input, output, history}`; options of these names give other fields. `history` is a list of earlier questions
    with their answers, which are trained, too.
    """
    options, reader = source.options, TurnReader(source, where, has_turns=False)
    names = _names(options, "instruction", "input", "output", "history")
    reader.check_row(value, names)
    reader.check_items(value, names)
    instruction = trimmed(text_of(value, names[0]))
    given = reader.optional_input(text_of(value, names[1], required=False))
    question = f"{instruction}\n\n{given}" if given else instruction
    return _exchange(reader, value, [*_history(value, names[3]), question, text_of(value, names[2])])


def _history(value: Any, name: str | int) -> list[str]:
    """Questions and answers, one after the other."""
    found = lookup(value, name)
    if not holds(found):
        return []
    pairs = [plain(pair) for pair in listing(found)] if isinstance(listing(found), list) else [None]
    texts = [text for pair in pairs if isinstance(pair, list) and len(pair) == 2 for text in map(scalar, pair) if text is not None]
    if len(texts) != 2 * len(pairs):
        raise BadRow(f"{name}_is_no_list_of_pairs")
    return texts


def _qa(value: Any, source: SourceSpec, where: str) -> Conversation | Drop:
    """`{question, answer}`; options of these names give other fields or column numbers.

    Option `template` puts the question into a sentence: `한국어로 옮기세요: {question}`; `prompt` is a question that all rows share
    and none of them holds; `booleans` is how answers that are true and false are written: `[예, 아니요]`. `text` names the
    fields that pretraining reads as a text (adapter `text`, option `field`): the row is held out where that text is.
    """
    options, reader = source.options, TurnReader(source, where, has_turns=False)
    names = [options.get("answer", "answer")] if "prompt" in options else _names(options, "question", "answer")
    reader.check_row(value, names)
    reader.check_items(value, names)
    question = options["prompt"] if "prompt" in options else trimmed(text_of(value, names[0]))
    if question and "template" in options:
        question = options["template"].replace("{question}", question)
    found = _exchange(reader, value, [question, text_of(value, names[-1], booleans=options.get("booleans"))])
    if isinstance(found, Drop) or "text" not in options:
        return found
    whole = document(text_of(value, options["text"]), where, source.language)
    return whole if isinstance(whole, Drop) else replace(found, origin=whole.text)


def _names(options: Mapping[str, Any], *names: str) -> list[Any]:
    return [options.get(name, name) for name in names]


def _check_qa(source: SourceSpec) -> str | None:
    options = source.options
    if problem := check_row_options(source):
        return problem
    if "prompt" in options and (given := [name for name in ("question", "template") if name in options]):
        return f"option {given[0]!r} has no effect beside 'prompt', which is the question of all rows"
    if options.get("question", "question") == options.get("answer", "answer") and "prompt" not in options:
        return f"options 'question' and 'answer' name the same field, {options.get('question', 'question')!r}"
    if others := sorted(set(_SLOT.findall(options.get("template", ""))) - {"question"}):
        return f"option 'template': {{{others[0]}}} is filled with nothing; several fields are a list in option 'question'"
    if "{question}" not in options.get("template", "{question}"):
        return "option 'template' has no {question}; a question that all rows share is option 'prompt'"
    if "booleans" in options and (len(options["booleans"]) != 2 or not all(isinstance(text, str) for text in options["booleans"])):
        return f"option 'booleans' must be two texts, for true and for false, got {options['booleans']!r}"
    return None


def _squad(value: Any, source: SourceSpec, where: str) -> Conversation | Drop:
    """`{context, question, answers: [{text}, ..]}`, also inside `data`, `paragraphs` and `qas`: a question for each, with its
    context.

    Of several answers, which are those of several readers, the first is taken; a question without any is dropped.
    """
    reader = TurnReader(source, where, has_turns=False)
    names = _names(source.options, "context", "question", "answers")
    reader.check_row(value, names)
    context, question = (trimmed(text_of(value, name)) for name in names[:2])
    if _is_said(lookup(value, "is_impossible")):
        raise BadRow("unanswerable")
    return _exchange(reader, value, [f"{context}\n\n{question}", _first_answer(lookup(value, names[2]), names[2])])


def _is_said(value: Any) -> bool:
    """Whether a field that says yes or no says yes, also as a number or text; other values refuse the source."""
    if value is None or value != value or value == "":  # NaN is how a table says null
        return False
    text = str(value).strip().lower()
    if text not in (*YES, *NO):
        raise Undeclared("is_impossible", value, "true or 1 is a question without an answer, false or 0 one with an answer")
    return text in YES


def _first_answer(value: Any, name: str | int) -> str:
    answers = listing(value)
    if isinstance(answers, dict):
        answers = plain(answers.get("text"))
    first = answers[0] if isinstance(answers, list) and answers else answers
    if not holds(first):
        raise BadRow("unanswerable" if value is not None else f"missing_{name}")
    text = scalar(first.get("text") if isinstance(first, dict) else first)
    if text is None:
        raise BadRow(f"{name}_is_not_text", type(first).__name__)
    return text


def _exchange(reader: TurnReader, value: Any, texts: list[str]) -> Conversation | Drop:
    """Questions and answers in turn; the row's reasoning is that of the last answer."""
    turns = [Message(("user", "assistant")[place % 2], trimmed(text)) for place, text in enumerate(texts)]
    turns[-1] = reader.reasoned(turns[-1], value)
    return reader.conversation(value, turns)


def _dialogue(value: Any, source: SourceSpec, where: str) -> Conversation | Drop:
    """A list of turns, user first: strings, or pairs of user and assistant; option `field` names it in an object."""
    reader, name = TurnReader(source, where, has_turns=False), source.options.get("field", "dialogue")
    reader.check_row(value, [name])
    turns = listing(lookup(value, name) if isinstance(value, dict) else value if isinstance(plain(value), list) else None)
    if not isinstance(turns, list):
        raise BadRow("missing_dialogue") if turns is None else BadRow("malformed_row", f"turns are a {type(turns).__name__}")
    pairs = [turn for each in turns if isinstance(turn := plain(each), list)]
    if pairs and (len(pairs) < len(turns) or any(len(pair) != 2 for pair in pairs[:-1]) or not 1 <= len(pairs[-1]) <= 2):
        raise BadRow("malformed_row", "not all turns are pairs")
    flat = [scalar(part) for part in ([part for pair in pairs for part in pair] if pairs else turns)]
    if None in flat:
        raise BadRow("malformed_row", "turns are no texts; objects with a role and a text are for adapter messages")
    return _exchange(reader, value, [str(part) for part in flat]) if flat else reader.conversation(value, [])


def unfolded(value: Any, source: SourceSpec, names: tuple[str, ...] = ()) -> Iterator[Any]:
    """The records of a row, by option `unfold`: for each item of the list of the first name, then inside it of the next, the item
    with what stands beside the list. `a, b` are lists whose items belong together. A row without the list is itself a record.
    """
    values = [value]
    for name in source.options.get("unfold", names):
        values = [inner for each in values for inner in _items(each, [part.strip() for part in str(name).split(",")])]
    yield from values


def _items(value: Any, names: list[str]) -> Iterator[Any]:
    if not isinstance(value, dict) or not any(name in value for name in names):
        yield value
        return
    outside = {key: each for key, each in value.items() if key not in names}
    lists = [listing(value.get(name)) for name in names]
    if not all(isinstance(items, list) for items in lists) or len(set(map(len, lists))) != 1:
        yield BadRow("malformed_row", f"{', '.join(names)}: no list, or of different lengths")
    elif not lists[0]:
        yield BadRow("empty_list", names[0])
    else:
        for items in zip(*lists, strict=True):
            inside: dict[str, Any] = {}
            for name, item in zip(names, items, strict=True):
                inside |= item if isinstance(item, dict) else {name: item}
            yield outside | inside


def _reads(
    *fields: str, turns: tuple[str, ...] = (), optional: tuple[str, ...] = (), reasoning: tuple[str, ...] = REASONING
) -> Callable[[SourceSpec], Reads]:
    """Fields by the options that name them; of `turns`, those that hold turns, the option may be `field`."""

    def of(source: SourceSpec) -> Reads:
        options = source.options
        lists = [options.get("field", options.get(name, name)) for name in turns]
        keys = [options.get(name, name) for name in fields]
        return reads(source, [*keys, *reasoning], lists, optional)

    return of


def _reads_qa(source: SourceSpec) -> Reads:
    options = source.options
    names = ["answer"] if "prompt" in options else ["question", "answer"]
    texts = [options["text"]] if "text" in options else []
    return reads(source, [*_names(options, *names), *texts, *REASONING])


def _check_kto(source: SourceSpec) -> str | None:
    return check_label_is_read(source) or check_turns(source)


def _reads_kto(source: SourceSpec) -> Reads:
    return reads(source, [source.options.get("label", "label"), *REASONING], _names(source.options, "prompt", "completion"))


def _reads_dialogue(source: SourceSpec) -> Reads:
    return reads(source, [source.options.get("field", "dialogue"), *REASONING])


def _adapter(
    convert: Any, options: OptionTable, reads: Callable[[SourceSpec], Reads], example: Any, check: Any = check_row_options
) -> Adapter:
    """An adapter of conversations; the options of all are added."""
    return Adapter(
        "conversations",
        guarded(convert),
        TABLES,
        {**OF_ALL, **options},
        meaning=described(convert),
        split=unfolded,
        split_option="unfold",
        check=check,
        reads=reads,
        example=example,
    )


OF_ALL: OptionTable = {
    **ROW_OPTIONS,
    "unfold": Option(
        LIST, "lists of the row, one inside another, of which each item is a record; `a, b`: lists whose items belong together"
    ),
}
"""Options of every adapter here."""
_COMPLETION = {
    "prompt": Option(NAME, "field with the text or the turns before the answer", "prompt"),
    "completion": Option(NAME, "field with the answer, a text or turns", "completion"),
}


def _field(default: str) -> Option:
    return Option(NAME, "field with the list of turns", default)


_CHAT = [{"role": "user", "content": "Name a tree."}, {"role": "assistant", "content": "An oak."}]
_HEARD = [{"from": "human", "value": "Name a tree."}, {"from": "gpt", "value": "An oak."}]
_SQUAD = replace(
    _adapter(
        _squad,
        {
            "context": Option(NAMES, "field with the text that the question is about", "context"),
            "question": Option(NAMES, "field with the question", "question"),
            "answers": Option(NAME, "field with the answers, of which the first is taken", "answers"),
        },
        _reads("context", "question", "answers", "is_impossible"),
        {"context": "The mill stands by the river.", "question": "Where is the mill?", "answers": [{"text": "by the river"}]},
    ),
    split=lambda value, source: unfolded(value, source, SQUAD_LISTS),
    split_option=None,
)
ADAPTERS = {
    "messages": _adapter(
        _messages,
        {**TURN_OPTIONS, "field": _field("messages")},
        _reads(turns=("messages",), reasoning=()),
        {"messages": _CHAT},
        check_turns,
    ),
    "sharegpt": _adapter(
        _sharegpt,
        {**TURN_OPTIONS, "field": _field("conversations")},
        _reads(turns=("conversations",), reasoning=()),
        {"conversations": _HEARD},
        check_turns,
    ),
    "prompt_completion": _adapter(
        _prompt_completion,
        {**TURN_OPTIONS, **_COMPLETION},
        _reads(turns=("prompt", "completion")),
        {"prompt": "Name a tree.", "completion": "An oak."},
        check_turns,
    ),
    "kto": _adapter(
        _kto,
        {**TURN_OPTIONS, **_COMPLETION, "label": Option(NAME, "field that says whether the completion is good", "label")},
        _reads_kto,
        {"prompt": _CHAT[:1], "completion": _CHAT[1:], "label": True},
        _check_kto,
    ),
    "alpaca": _adapter(
        _alpaca,
        {
            "instruction": Option(NAMES, "field with what is asked", "instruction"),
            "input": Option(NAMES, "field with what it is asked of, put below it", "input"),
            "output": Option(NAMES, "field with the answer", "output"),
            "history": Option(NAME, "field with a list of earlier questions with their answers", "history"),
        },
        _reads("instruction", "input", "output", "history", optional=("input", "history")),
        {"instruction": "Add.", "input": "1, 2", "output": "3", "history": [["Name a tree.", "An oak."]]},
    ),
    "qa": _adapter(
        _qa,
        {
            "question": Option(NAMES, "field with the question", "question"),
            "answer": Option(NAMES, "field with the answer", "answer"),
            "template": Option(TEXT, "sentence that the question is put into, at {question}"),
            "prompt": Option(TEXT, "question that all rows share and none of them holds"),
            "booleans": Option(LIST, "two texts: how answers that are true and false are written"),
            "text": Option(NAMES, "fields that pretraining reads as a text (`field` of adapter text): held out where that text is"),
        },
        _reads_qa,
        {"question": "Name a tree.", "answer": "An oak."},
        _check_qa,
    ),
    "squad": _SQUAD,
    "dialogue": _adapter(_dialogue, {"field": _field("dialogue")}, _reads_dialogue, {"dialogue": [["Name a tree.", "An oak."]]}),
}
