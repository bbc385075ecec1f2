"""Every adapter: what rows it reads, its options, the fields it looks at, an example, and why it drops a row; all from the code.

In: nothing, or an adapter's name. Out: `docs/adapters.md` (`python -m keural.data.preview.reference` prints it), or the text of
one adapter (`keural data adapters NAME`).
"""

import json
from collections.abc import Iterable, Mapping
from functools import cache
from inspect import isfunction
from types import CodeType
from typing import Any

from keural.data.adapters import ADAPTERS, Adapter, conversations, documents, passages, preferences
from keural.data.adapters.base import Reads
from keural.data.adapters.evaluation import ADAPTERS as BENCHMARKS
from keural.data.adapters.reasons import PATTERNS, REASONS, reason_of
from keural.data.adapters.turns import TURN_OPTIONS
from keural.data.filtering.gates import EAGER_SHARE, GATES, Gatekeeper
from keural.data.filtering.holdout import Splitter
from keural.data.preview.marked import spans_of
from keural.data.preview.shapes import SHAPES, Shape
from keural.data.readers.formats import FILE_OPTIONS, FORMATS
from keural.data.readers.options import Option, OptionTable
from keural.data.records import Drop, EvaluationItem
from keural.data.tokens.encode import Encoder
from keural.errors import UserError, nearest
from keural.recipe import SourceSpec
from keural.terminal import MARKS, show_text, yaml_text

INTRODUCTION = """\
# Adapters

Made from `src/keural/data/` by `make docs`; a test compares the two. `keural data adapters` lists them, and `keural data adapters
NAME` shows one. `keural data try FILE` says which of them reads a file.

An adapter is named in a source of a recipe and says what a row means. A field that carries meaning is honoured, or the row is
dropped and counted, or the source is refused; fields that the adapter does not know are listed once per source ("not read: ..").
A name of a field may be a path into the row (`answers.0.text`), and where columns have no names their number.
"""
GENERAL = {
    "conversations": {**conversations.ADAPTERS, **passages.ADAPTERS},
    "pairs": {**preferences.ADAPTERS},
    "documents": {**documents.ADAPTERS},
}
"""Adapters of shapes, by what they give; the others are of published sets."""
TITLES = {
    "conversations": "Conversations (objective `sft`; with a label `kto`)",
    "pairs": "Pairs of answers (objective `dpo`; one by one `kto`)",
    "documents": "Documents (objective `next_token`)",
    "sets": "Sets and corpora by name",
    "evaluation": "Benchmarks (`data.decontaminate`)",
}
_KINDS = {"conversations": "conversations", "pairs": "pairs", "documents": "documents", "evaluation": "benchmarks"}


def adapter_named(name: str) -> Adapter:
    """The adapter of a name, those of benchmarks included. Raises `UserError` naming the nearest one."""
    known = {**ADAPTERS, **BENCHMARKS}
    if name not in known:
        raise UserError(f"no adapter {name!r}{nearest(name, known)}; `keural data adapters` lists all")
    return known[name]


def kind_of(adapter: Adapter) -> str:
    """What an adapter gives, in a word."""
    return _KINDS[adapter.kind] if isinstance(adapter.kind, str) else "what its option part says"


# Which fields an adapter reads, and why it drops a row


def fields_of(name: str) -> tuple[list[str], list[str], list[str]]:
    """Fields of a row that an adapter reads by default: those that its options name, the others, and fields of a turn."""
    adapter = adapter_named(name)
    named = [field for option in adapter.options.values() if option.names_fields for field in _names(option.default)]
    if adapter.reads is None:
        return list(dict.fromkeys(named)), [], []
    read: Reads = adapter.reads(SourceSpec(name=name, adapter=name))
    first = [field for field in dict.fromkeys(named) if field in read.keys]
    return first, sorted(read.keys - set(first)), sorted(read.turn_keys) if read.turns else []


def _names(default: Any) -> Iterable[str]:
    return default if isinstance(default, tuple) else () if default is None else (default,)


@cache
def reasons_of(name: str) -> list[str]:
    """Why an adapter drops a row, or what it notes of one, as names of `REASONS`: what its functions can say."""
    found = _texts_within(adapter_named(name).convert)
    return [reason for reason in REASONS if reason in found or reason in {PATTERNS.get(text) for text in found}]


def reasons_after(kind: str) -> list[str]:
    """Why rows of a kind are dropped whichever adapter read them: formats, gates, length, and what was there before."""
    encode = {"documents": Encoder._document, "conversations": Encoder._conversation, "pairs": Encoder._pair}[kind]
    starts: list[Any] = [*(known.read for known in FORMATS.values()), encode, Splitter.assign]
    if kind != "documents":
        starts.append(Gatekeeper._length)
    found = set().union(*map(_texts_within, starts))
    found |= {reason for name, gate in GATES.items() for reason in gate.reasons if kind != "documents" or name == "contaminated"}
    return [reason for reason in REASONS if reason in found]


def _texts_within(start: Any) -> set[str]:
    """Every text that a function of this package can come to: its own, and of what it calls."""
    texts: set[str] = set()
    names: set[str] = set()
    waiting, seen, classes = [start], set[int](), list[type]()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, str):
            texts.add(value)
        elif isinstance(value, CodeType):
            names |= set(value.co_names)
            waiting += [constant for constant in value.co_consts if isinstance(constant, str | CodeType)]
        elif isinstance(value, Adapter):
            waiting.append(value.convert)
        elif isfunction(value) and value.__module__.startswith("keural.data."):
            code = value.__code__
            waiting += [code, *(value.__globals__[name] for name in _global_names(code) if name in value.__globals__)]
            waiting += [cell.cell_contents for cell in value.__closure__ or ()]
        elif isinstance(value, type) and value.__module__.startswith("keural.data.adapters"):
            classes.append(value)
        elif isinstance(value, tuple):
            waiting += [item for item in value if isfunction(item)]
        elif (rules := getattr(value, "rules", None)) is not None or hasattr(value, "mend"):
            waiting += [*(rules or ()), getattr(value, "mend", None)]
        for known in classes:
            waiting += [method for name, method in vars(known).items() if name in (*names, "__init__") and isfunction(method)]
    return texts


def _global_names(code: CodeType) -> set[str]:
    return set(code.co_names).union(*(_global_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


# The page


def markdown() -> str:
    """The reference page."""
    parts = [INTRODUCTION, _shapes(), _options_of_all()]
    for kind, known in GENERAL.items():
        parts += [f"## {TITLES[kind]}\n", *(_section(name) for name in known)]
    return "\n".join([*parts, _sets(), _benchmarks(), _formats(), _gates(), _reasons()])


def _shapes() -> str:
    lines = [
        "## Shapes of rows, and what reads them\n",
        f"Each is one literal row, the source that reads it, and what becomes of it: what is trained stands between {MARKS[0]} and "
        f"{MARKS[1]}.\n",
    ]
    return "\n".join([*lines, *map(_shape, SHAPES)])


def _shape(shape: Shape) -> str:
    row = json.dumps(shape.row, ensure_ascii=False)
    return f"### {shape.name[0].upper()}{shape.name[1:]}\n\n" + "\n".join(
        [_block(row, "json"), _block(source_line("my-data", shape.adapter, shape.options), "yaml"), _block(becomes(shape), "text")]
    )


def _block(text: str, language: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```\n"


def source_line(name: str, adapter: str, options: Mapping[str, Any], **keys: Any) -> str:
    """A source as a line of a recipe."""
    source = {"name": name, "adapter": adapter, **keys, **({"options": dict(options)} if options else {})}
    flow = yaml_text(source, flow=True).strip()
    return f"- {flow}"


def becomes(shape: Shape) -> str:
    """The records of a shape's row as text, with marks around what is trained."""
    source = SourceSpec(name="shape", adapter=shape.adapter, options=shape.options)
    adapter = adapter_named(shape.adapter)
    split = adapter.splitter(source)
    texts = []
    for value in [shape.row] if split is None else split(shape.row, source):
        record = adapter(value, source, "row")
        assert not isinstance(record, Drop | EvaluationItem), (shape.name, record)
        for name, spans in spans_of(record).items():
            text = "".join(f"{MARKS[0]}{span.text}{MARKS[1]}" if span.trained else span.text for span in spans)
            texts.append(f"({name})\n{text}" if name in ("prompt", "chosen", "rejected") else text)
    return "\n".join(text.rstrip("\n") for text in texts)


def _section(name: str) -> str:
    adapter = adapter_named(name)
    lines = [f"### `{name}`\n", f"{adapter.meaning}\n"]
    if adapter.formats:
        lines.append(f"Formats: {', '.join(adapter.formats)}.\n")
    named, others, turns = fields_of(name)
    fields = [
        f"Fields of a row: {_codes(named)}." if named else "",
        f"Also read where they are there: {_codes(others)}." if others else "",
    ]
    fields.append(f"Fields of a turn: {_codes(turns)}." if turns else "")
    lines += [f"{' '.join(filter(None, fields))}\n"] if any(fields) else []
    if adapter.example is not None:
        lines.append(_block(json.dumps(adapter.example, ensure_ascii=False), "json"))
    shared = {option: known for table in _SHARED.values() for option, known in table.items()}
    own = {option: known for option, known in adapter.options.items() if shared.get(option) != known}
    also = [title for title, table in _SHARED.items() if table.items() <= adapter.options.items()]
    if own:
        lines.append(_option_table(own))
    if also:
        lines.append(f"Options of {' and of '.join(also)}, too.\n")
    if reasons := reasons_of(name):
        lines.append(f"Drops or notes: {_codes(reasons)}.\n")
    return "\n".join(lines)


_SHARED: dict[str, OptionTable] = {
    "all conversations": conversations.OF_ALL,
    "turns": {name: option for name, option in TURN_OPTIONS.items() if name not in conversations.OF_ALL},
}


def _options_of_all() -> str:
    lines = ["## Options that many adapters have\n"]
    for title, table in _SHARED.items():
        lines += [f"### Options of {title}\n", _option_table(table)]
    return "\n".join(lines)


def _option_table(options: OptionTable) -> str:
    rows = ["| option | meaning | value | default |", "|---|---|---|---|"]
    rows += [_row(f"`{name}`", option.meaning, option.kind, _default(option)) for name, option in options.items()]
    return "\n".join([*rows, ""])


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "\\<") for cell in cells) + " |"


def _default(option: Option) -> str:
    if option.default is None:
        return "none"
    return " or ".join(f"`{json.dumps(name) if not isinstance(name, str) else name}`" for name in _names(option.default))


def _codes(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _sets() -> str:
    shapes = {name for known in GENERAL.values() for name in known}
    rows = ["| adapter | gives | licence | what it reads | its own options |", "|---|---|---|---|---|"]
    for name, adapter in sorted(ADAPTERS.items()):
        if name not in shapes:
            own = [option for option, known in adapter.options.items() if known not in _EVERY_OPTION]
            rows.append(_row(f"`{name}`", kind_of(adapter), adapter.license or "", adapter.meaning, _codes(own)))
    return "\n".join([f"## {TITLES['sets']}\n", "`keural data adapters NAME` says all of each.\n", *rows, ""])


_EVERY_OPTION = [option for known in GENERAL.values() for adapter in known.values() for option in adapter.options.values()]


def _benchmarks() -> str:
    rows = ["| adapter | what it reads |", "|---|---|"]
    rows += [_row(f"`{name}`", adapter.meaning) for name, adapter in sorted(BENCHMARKS.items())]
    return "\n".join([f"## {TITLES['evaluation']}\n", *rows, ""])


def _formats() -> str:
    rows = ["| format | suffixes | option | meaning | value | default |", "|---|---|---|---|---|---|"]
    for name, known in FORMATS.items():
        suffixes = " ".join(f"`{suffix}`" for suffix in known.suffixes)
        options = known.options.items() or [("", None)]
        for number, (option, what) in enumerate(options):
            first = (f"`{name}`", suffixes) if number == 0 else ("", "")
            rest = ("", "", "", "") if what is None else (f"`{option}`", what.meaning, what.kind, _default(what))
            rows.append(_row(*first, *rest))
    rows += [_row("any", "", f"`{name}`", what.meaning, what.kind, _default(what)) for name, what in FILE_OPTIONS.items()]
    return "\n".join(["## Formats of files\n", "The options stand among those of the source.\n", *rows, ""])


def _gates() -> str:
    lines = [
        "## Gates of conversations and pairs\n",
        "For each a source says what is done with a record in which it finds something: `gates: {blanks: drop}`. `drop` leaves "
        "the record out, `count` keeps it and shows how many there are, `skip` does not look. A gate that drops over "
        f"{EAGER_SHARE:.0%} of a source is warned about.\n",
        "| gate | finds | does not find | by default | counted as |",
        "|---|---|---|---|---|",
    ]
    for name, gate in GATES.items():
        others = {adapter: known.gates[name] for adapter, known in ADAPTERS.items() if name in known.gates}
        default = "; ".join([f"`{gate.action}`", *(f"of `{adapter}` `{action}`" for adapter, action in others.items())])
        cells = (f"`{name}`", gate.takes, gate.leaves, default, ", ".join(f"`{reason}`" for reason in gate.reasons))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def _reasons() -> str:
    lines = [
        "## Why a row is dropped, and what can be done\n",
        "Those that end in nothing of an adapter come from formats, gates, length, and from what was there before.\n",
        "| reason | meaning | what to do |",
        "|---|---|---|",
    ]
    return "\n".join([*lines, *(_row(f"`{name}`", reason.meaning, reason.remedy) for name, reason in REASONS.items()), ""])


# One adapter


def listing() -> str:
    """Every adapter with what it gives and reads, a line each."""
    known = {**ADAPTERS, **BENCHMARKS}
    width = max(map(len, known))
    lines = [f"{name:<{width}}  {kind_of(adapter)}: {_plain(adapter.meaning)}" for name, adapter in known.items()]
    return "\n".join([*lines, ""])


def explain(name: str) -> str:
    """All there is to say of an adapter, in plain words. Raises `UserError` with the nearest name where there is none."""
    adapter = adapter_named(name)
    lines = [f"{name} ({kind_of(adapter)})", f"  {_plain(adapter.meaning)}"]
    lines += [f"  formats: {', '.join(adapter.formats)}"] if adapter.formats else ["  takes no path"]
    lines += [f"  licence: {adapter.license}"] if adapter.license else []
    for title, fields in zip(
        ("fields of a row", "also read where they are there", "fields of a turn"), fields_of(name), strict=True
    ):
        lines += [f"  {title}: {', '.join(fields)}"] if fields else []
    if adapter.example is not None:
        lines.append(f"  a row: {json.dumps(adapter.example, ensure_ascii=False)}")
    for shape in SHAPES:
        if shape.adapter == name and (shape.options or shape.row != adapter.example):
            lines.append(f"  {shape.name}: {json.dumps(shape.row, ensure_ascii=False)}")
            lines += [f"    options: {yaml_text(shape.options, flow=True).strip()}"] if shape.options else []
    lines += [f"options of {name}"] if adapter.options else []
    lines += [
        f"  {option}: {known.meaning} ({known.kind}; default: {_plain(_default(known))})"
        for option, known in adapter.options.items()
    ]
    lines += [f"why {name} drops a row, or what it notes of one"] if reasons_of(name) else []
    lines += [_reason_line(reason) for reason in reasons_of(name)]
    if isinstance(adapter.kind, str) and adapter.kind != "evaluation":
        lines += ["why rows are dropped by formats, gates and lengths, or as duplicates"]
        lines += [_reason_line(reason) for reason in reasons_after(adapter.kind) if reason not in reasons_of(name)]
    return "\n".join([*lines, ""])


def _reason_line(name: str) -> str:
    reason = reason_of(name)
    assert reason is not None
    return f"  {name}: {reason.meaning}{f' -> {reason.remedy}' if reason.remedy else ''}"


def _plain(text: str) -> str:
    return text.replace("`", "")


if __name__ == "__main__":
    show_text(markdown())
