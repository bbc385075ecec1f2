"""A source tried on its first rows: which adapter reads it, what becomes of its rows, what is dropped and why, what is not read.

In: a file, a directory, or a source as a recipe has it. Out: a `Trial`, for `keural data try` to print. No tokenizer is needed,
nothing is written, and of a large file only the beginning is read.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from keural.data.adapters import ADAPTERS, adapter_of
from keural.data.field_use import FieldUse, excerpt
from keural.data.filtering.gates import GATES, Gatekeeper, check_gates
from keural.data.filtering.holdout import Splitter
from keural.data.filtering.languages import MIN_SHARE, hangul_share
from keural.data.preview.guess import ARCHIVES, Guess, Rows, benchmark_of, guesses
from keural.data.readers.datafile import DataFile, FileShape, Row
from keural.data.readers.formats import FILE_OPTIONS, FORMATS, format_of, open_text
from keural.data.readers.notes import ReadingNotes
from keural.data.readers.sniff import describe, sniff
from keural.data.records import Document, Drop, EvaluationItem, Record
from keural.data.source_counts import SourceCounter
from keural.data.sources import Source, open_source
from keural.data.tokens.encode import texts_of
from keural.errors import UserError
from keural.parsing import Malformed, json_beginning, parse_yaml
from keural.recipe import OBJECTIVES, SourceSpec
from keural.recipe.base import validate

MAX_ROWS = 2_000
"""So many rows are read of a source."""
MAX_CHARACTERS = 8_000_000
"""And no more after this much text."""
MAX_FILES = 8
"""Of a directory the rows of so many files are looked at."""
MAX_WHOLE_BYTES = 32 << 20
"""Of a larger file of a format that is read as one value only the beginning is looked at."""
HEAD_CHARACTERS = 4 << 20
"""The beginning of such a file."""
LONGEST_NAME = 60
"""Characters of a column's name; a longer one is a cell."""
MOST_WORDS = 5
"""A name of so many words is a cell, too."""
EXAMPLES = 3
"""Kept rows, and dropped rows of each reason, that are shown."""
FOREIGN = 0.02
"""Share of other letters that English text may have."""
SAMPLE = 100
"""Records of which the language is looked at."""
EXCERPT = 300
"""Characters of a dropped row that are shown."""


@dataclass
class Trial:
    """What a source was found to be, and what becomes of its first rows."""

    spec: SourceSpec
    """As it may stand in a recipe."""
    data_dir: Path
    """What its path is relative to."""
    what: list[str]
    """What it is read from: files, format, encoding."""
    guesses: list[Guess] = field(default_factory=list)
    """Adapters that read it, the best first; none where the adapter was given."""
    whole: bool = True
    """Whether every row was looked at."""
    sample: list[Record] = field(default_factory=list)
    """The first records that are kept."""
    counter: SourceCounter | None = None
    drops: dict[str, list[tuple[Drop, str]]] = field(default_factory=dict)
    """The first drops of each reason, with the beginning of the row."""
    not_read: tuple[str, ...] = ()
    refusal: str | None = None
    """Why a recipe with this source would be refused."""
    hints: list[str] = field(default_factory=list)

    @property
    def objective(self) -> str:
        """The first objective that trains on what the source gives."""
        kind = ADAPTERS[self.spec.adapter].kind_of(self.spec)
        return next(name for name, known in OBJECTIVES.items() if known.store == kind)


def try_path(path: Path, adapter: str | None, options: Mapping[str, Any], data_dir: Path | None) -> list[Trial]:
    """Try a file, a directory, or every source of a YAML file with sources.

    `adapter` and `options` are those to try; without them they are guessed. Paths of sources are relative to `data_dir`, or else
    to the directory of what is tried. Raises `UserError` where there is nothing to read, or no adapter keeps a row: it names the
    fields that the rows have.
    """
    if not path.exists() and data_dir is not None and (data_dir / path).exists():
        path = data_dir / path
    if not path.exists():
        raise UserError(f"{path}: no such file or directory")
    if adapter is None and not options and (specs := sources_in(path)):
        return [_try_source(spec, data_dir or path.parent) for spec in specs]
    if adapter is not None:
        adapter_of(SourceSpec(name=path.stem, adapter=adapter))
    return [_try_files(path, adapter, options, data_dir)]


def sources_in(path: Path) -> list[SourceSpec]:
    """The sources that a YAML file describes: one, a list, `sources:`, or those of a stage; none where it is something else."""
    if path.suffix.lower() not in (".yaml", ".yml") or not path.is_file() or path.stat().st_size > HEAD_CHARACTERS:
        return []
    try:
        value = parse_yaml(path.read_text(encoding="utf-8"))
    except (Malformed, UnicodeDecodeError):
        return []
    if isinstance(value, dict) and isinstance(value.get("data"), dict):
        value = value["data"]
    if isinstance(value, dict) and isinstance(value.get("sources"), list):
        value = [*value["sources"], *(value.get("heldout_sources") or [])]
    found = value if isinstance(value, list) else [value]
    if not found or not all(isinstance(item, dict) and "adapter" in item for item in found):
        return []
    return [validate(SourceSpec, {"name": path.stem, **item}, path) for item in found]


def _try_source(spec: SourceSpec, data_dir: Path) -> Trial:
    """A source as a recipe has it."""
    source = open_source(spec, data_dir)
    what = [_what(file.path, describe(file.path)) for file, _ in source.files[:1]]
    if len(source.files) > 1:
        what = [f"{len(source.files):,} files, the first {what[0]}"]
    trial = Trial(spec, data_dir.absolute(), what or [spec.hub or f"rows that adapter {spec.adapter} makes"])
    parts = [replace(source, files=(file,)) for file in _spread(source.files)] or [source]
    rows, whole = _first_rows(parts)
    _read(trial, source, rows, whole and len(source.files) <= MAX_FILES)
    return trial


def _try_files(path: Path, adapter: str | None, options: Mapping[str, Any], data_dir: Path | None) -> Trial:
    """A file, or the files of a directory, of which nothing is known."""
    base = (data_dir or path.parent).absolute()
    found = _Files.below(path, adapter)
    known = {**FILE_OPTIONS, **(FORMATS[found.format_name].options if found.format_name in FORMATS else {})}
    reading = {name: value for name, value in options.items() if name in known}
    chosen = {name: value for name, value in options.items() if name not in reading}
    if chosen and adapter is None:
        raise UserError(f"{path}: option {next(iter(chosen))!r} is of an adapter; give --adapter, too")
    if adapter is not None:
        _carrier(found.files[0], found.format_name, adapter, options, base)  # refuses options that it does not have
    sources = [_carrier(file, found.format_name, adapter, reading, base) for file in _spread(found.files)]
    rows, whole = _first_rows(sources)
    values = [row for row in rows if isinstance(row, Row)]
    if "header" in known and "header" not in reading and values and _is_headless(values):
        reading["header"] = False
        found.hints.append("its first line looks like a row, not like names of columns: options header")
        rows, whole = _first_rows([_carrier(file, found.format_name, adapter, reading, base) for file in _spread(found.files)])
        values = [row for row in rows if isinstance(row, Row)]
    if not values:
        raise _nothing_read(path, found.format_name, rows)
    looked_at = Rows(found.format_name, str(path), values)
    fitting = guesses(looked_at, adapter, chosen or None)
    if (inner := _rows_inside(looked_at)) is not None and not reading:
        key, rows_inside = inner
        deeper = guesses(rows_inside, adapter, chosen or None)
        keeps_more = bool(fitting and deeper) and fitting[0].kept == 0 < deeper[0].kept
        if deeper and (not fitting or keeps_more or deeper[0].score - 0.01 > fitting[0].score):
            fitting, reading, looked_at, rows = deeper, {"rows": key}, rows_inside, list(rows_inside.rows)
    if not fitting:
        raise _nothing_fits(path, looked_at, adapter, chosen)
    best = fitting[0]
    spec = SourceSpec(
        name=re.sub(r"[^\w.-]+", "-", path.name.split(".")[0]).strip("-") or "data",
        adapter=best.adapter,
        path=_relative(found.files[0] if len(found.files) == 1 else path, base) + found.pattern(best.adapter),
        format=found.format_to_give,
        options={**reading, **best.options},
    )
    trial = Trial(spec, base, [found.described()], fitting, hints=[*found.hints, *found.shape.assumed, *_assumed(best.options)])
    _read(trial, open_source(spec, base), rows, whole and len(found.files) <= MAX_FILES)
    _add_language(trial)
    if (benchmark := benchmark_of(looked_at)) is not None:
        trial.hints.append(f"its fields are those of the benchmark {benchmark}; data.decontaminate looks for its items")
    return trial


@dataclass
class _Files:
    """The files of one format that are tried."""

    path: Path
    files: list[Path]
    shape: FileShape
    """Of the first."""
    others: Counter[str]
    """How many there are of other formats."""
    hints: list[str]

    @property
    def format_name(self) -> str:
        """Their format."""
        return self.shape.format or "text"

    @property
    def format_to_give(self) -> str | None:
        """The format as a source must give it; None where the files' suffix, or what is in them, says it by itself."""
        named = format_of(self.files[0])
        return self.format_name if named is None or (named == "text" and named != self.format_name) else None

    @classmethod
    def below(cls, path: Path, adapter: str | None) -> "_Files":
        """A file, or of a directory those of the format that most of its bytes are of.

        Raises `UserError` for what cannot be read, and where no file of a directory is of a format that is known.
        """
        if path.is_file():
            shape, hints = _shape_of(path)
            return cls(path, [path], shape, Counter(), hints)
        everything = [file for file in sorted(path.rglob("*")) if file.is_file() and not _hidden(file, path)]
        known: dict[str, list[Path]] = {}
        for file in everything:
            name = format_of(file)
            if name is not None and (adapter is None or name in ADAPTERS[adapter].formats):
                known.setdefault(name, []).append(file)
        if not known and (unnamed := cls._unnamed(path, everything)) is not None:
            return unnamed
        if not known:
            suffixes = Counter(file.suffix or "none" for file in everything)
            there = ", ".join(f"{count:,} of {suffix}" for suffix, count in suffixes.most_common(5)) or "no files"
            raise UserError(f"{path}: holds no file of a known format, by suffix: {there}; give a file")
        chosen = max(known, key=lambda name: sum(file.stat().st_size for file in known[name]))
        others = Counter({name: len(files) for name, files in known.items() if name != chosen})
        unknown = len(everything) - sum(map(len, known.values()))
        left = [f"{count:,} {name}" for name, count in others.items()] + ([f"{unknown:,} of no known format"] if unknown else [])
        hints = [f"files that were not looked at: {', '.join(left)}"] if left else []
        return cls(path, known[chosen], _shape_of(known[chosen][0])[0], others, hints)

    @classmethod
    def _unnamed(cls, path: Path, everything: Sequence[Path]) -> "_Files | None":
        """The files of the suffix with most bytes, where the first of them shows what it is; None where it is only text."""
        by_suffix: dict[str, list[Path]] = {}
        for file in everything:
            by_suffix.setdefault(file.suffix, []).append(file)
        chosen = max(by_suffix.values(), key=lambda files: sum(file.stat().st_size for file in files), default=[])
        largest = max(chosen, key=lambda file: file.stat().st_size, default=None)
        shape = describe(largest) if largest is not None else None
        if largest is None or shape is None or shape.problem is not None or shape.format in (None, "text"):
            return None
        left = [f"the suffix of its files is of no known format; give the files by a glob: {path.name}/*{largest.suffix}"]
        return cls(path, [largest], shape, Counter(), left)

    def pattern(self, adapter: str) -> str:
        """What is added to a directory's path where the adapter would read its other files, too."""
        if not any(name in ADAPTERS[adapter].formats for name in self.others):
            return ""
        return f"/**/*{Counter(file.suffix for file in self.files).most_common(1)[0][0]}"

    def described(self) -> str:
        """The files in a line."""
        first = _what(self.files[0], self.shape)
        return first if len(self.files) == 1 else f"{len(self.files):,} files, the first {first}"


def _hidden(file: Path, below: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(below).parts)


def _spread(files: Sequence[Any]) -> list[Any]:
    """Some of many files, from everywhere among them."""
    step = max(1, len(files) // MAX_FILES)
    return list(files[::step][:MAX_FILES])


def _carrier(file: Path, format_name: str, adapter: str | None, options: Mapping[str, Any], base: Path) -> Source:
    """A source that gives the rows of a file, whatever they mean; of a large file that is one value those of its beginning."""
    reading = [name for name, known in ADAPTERS.items() if format_name in known.formats and format_name not in ARCHIVES]
    name = adapter or (reading[0] if reading else "text")
    spec = SourceSpec(name=file.stem or "data", adapter=name, path=str(file.absolute()), options=dict(options))
    if format_name not in ARCHIVES:
        spec = spec.model_copy(update={"format": format_name})
    return open_source(spec, base)


def _shape_of(path: Path) -> tuple[FileShape, list[str]]:
    """What a file is; of text that is clearly a table or JSON, that, and what to say of it."""
    shape = describe(path)
    if shape.problem is not None:
        raise UserError(f"{path}: {shape.problem}")
    if format_of(path) != "text":
        return shape, []
    inside = sniff(DataFile(path, path.stem, open=lambda: path.open("rb")))
    if inside.problem is not None or inside.format in (None, "text", "markdown"):
        return shape, []
    return inside, [
        f"its suffix is of text, but {next(iter(inside.evidence[1:] or inside.evidence))}; hence the format in the source"
    ]


def _what(path: Path, shape: FileShape) -> str:
    """A file in a line: its name, format, encoding and size."""
    cells = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}.get(shape.delimiter or "", f"{shape.delimiter!r}")
    how = [shape.format or "no known format", shape.packing, (shape.encoding or "").removesuffix("-sig")]
    how += [f"cells divided by {cells}"] if shape.delimiter else []
    return f"{path.name} ({', '.join([*filter(None, how), _size(path.stat().st_size)])})"


def _size(count: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000  # type: ignore[assignment]
    raise AssertionError


def _first_rows(sources: Sequence[Source]) -> tuple[list[Row | Drop], bool]:
    """The first rows of some sources, as many of each; and whether that is all of them."""
    found: list[Row | Drop] = []
    whole = True
    for source in sources:
        wanted, characters = MAX_ROWS // len(sources), 0
        for row in _rows_of(source):
            if wanted == 0 or characters > MAX_CHARACTERS // len(sources):
                whole = False
                break
            found.append(row)
            wanted -= 1
            characters += _length(row)
    return found, whole


def _rows_of(source: Source) -> Iterator[Row | Drop]:
    if source.files and (head := _beginning(*source.files[0])) is not None:
        return head
    return source.rows(0)


def _length(row: Row | Drop) -> int:
    value = row.value if isinstance(row, Row) else ""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return 100 + sum(len(part) * _WEIGHT.get(type(part), 1) if isinstance(part, str | list | dict) else 8 for part in parts)


_WEIGHT: dict[type, int] = {list: 200, dict: 200}
"""Characters that each item of a list or object is taken for."""


def _beginning(file: DataFile, format_name: str) -> Iterator[Row | Drop] | None:
    """The first rows of a file that is one value and too large to be read for a look; None for others."""
    if format_name not in ("json", "text", "markdown") or sum(path.stat().st_size for path in file.paths) <= MAX_WHOLE_BYTES:
        return None
    with open_text(file) as text:
        head = text.read(HEAD_CHARACTERS)
    if format_name != "json":
        return iter([Row(file.name, {"text": head})])
    items, _ = json_beginning(head)
    return (Row(f"{file.name}#{number}", item) for number, item in enumerate(items, start=1))


def _is_headless(rows: Sequence[Row]) -> bool:
    """Whether the names of columns look like a row's cells: sentences, numbers, or as long as what stands below them."""
    names = [str(name) for name in rows[0].value] if isinstance(rows[0].value, dict) else []
    return any(len(name) > LONGEST_NAME or len(name.split()) >= MOST_WORDS or re.search(r"\s.*[.?!]\s*$", name) for name in names)


def _assumed(options: Mapping[str, Any]) -> list[str]:
    """What options that are guessed say of the rows, where only their names or their order speak for it."""
    found = []
    if "unfold" in options:
        found.append(f"each item of {', '.join(options['unfold'])} becomes a record of its own, without those before it")
    if "order" in options:
        found.append(f"that {options['answers']} stand in order, the best first, is only assumed: option order")
    if options.get("lower_is_better"):
        found.append(f"that the lowest {options['scores']} is the best is only assumed, from its name: option lower_is_better")
    return found


def _rows_inside(rows: Rows) -> tuple[str, Rows] | None:
    """The list of objects inside the one object that a file is, with the name of its field."""
    if rows.format_name not in ("json", "yaml") or len(rows.rows) != 1 or not rows.records:
        return None
    fields = rows.records[0].items()
    lists = {key: value for key, value in fields if isinstance(value, list) and value and isinstance(value[0], dict | list)}
    if not lists:
        return None
    key = max(lists, key=lambda name: len(lists[name]))
    where = rows.rows[0].where
    inside = [Row(f"{where}#{number}", item) for number, item in enumerate(lists[key][:MAX_ROWS], start=1)]
    return str(key), Rows(rows.format_name, rows.path, inside)


def _relative(path: Path, base: Path) -> str:
    absolute = path.absolute()
    return absolute.relative_to(base).as_posix() if absolute.is_relative_to(base) else absolute.as_posix()


def _nothing_read(path: Path, format_name: str, rows: Sequence[Row | Drop]) -> UserError:
    drops = Counter(drop.reason for drop in rows if isinstance(drop, Drop))
    found = ", ".join(f"{reason} {count:,}" for reason, count in drops.items()) or "it holds no rows"
    first = next((drop for drop in rows if isinstance(drop, Drop)), None)
    found += f"; first {first.where}{f': {first.detail}' if first.detail else ''}" if first is not None else ""
    return UserError(f"{path}: nothing in it can be read as {format_name} ({found}); give its format, or mend the file")


def _nothing_fits(path: Path, rows: Rows, adapter: str | None, options: Mapping[str, Any]) -> UserError:
    """The refusal of rows that no adapter keeps: what they have, and what is nearest."""
    first = rows.rows[0].value
    has = f"its rows have the fields {', '.join(rows.keys[:12])}" if rows.keys else f"its rows are of type {type(first).__name__}"
    if adapter is None:
        example = f"--adapter qa question={rows.telling[0] if rows.telling else 'FIELD'} answer=.."
        return UserError(f"{path}: no adapter keeps a row; {has}; name them in options, e.g. {example} (`keural data adapters`)")
    source = SourceSpec(name="s", adapter=adapter, options=dict(options))
    record = ADAPTERS[adapter](first, source, rows.rows[0].where)
    assert isinstance(record, Drop)
    why = f"{record.reason}{f' ({record.detail})' if record.detail else ''}"
    return UserError(f"{path}: adapter {adapter} keeps no row, the first for {why}; {has}; see `keural data adapters {adapter}`")


def _read(trial: Trial, source: Source, rows: Sequence[Row | Drop], whole: bool) -> None:
    """What becomes of the rows: adapter, gates, duplicates; counted as preparing counts them."""
    check_gates(source)
    spec, adapter = source.spec, source.adapter
    counter = trial.counter = SourceCounter(spec, "train")
    counter.fields = FieldUse(adapter, spec)
    keeper, splitter = Gatekeeper(spec, adapter.gates), Splitter(0.0)
    trial.whole, notes = whole, ReadingNotes()
    try:
        for value, record in source.records(rows, counter.fields, notes):
            assert not isinstance(record, EvaluationItem)
            result = _passed(record, spec, keeper, splitter)
            if isinstance(result, Drop):
                examples = trial.drops.setdefault(result.reason, [])
                if len(examples) < EXAMPLES:
                    examples.append((result, excerpt(value, EXCERPT)))
                counter.drop(result)
                continue
            counter.rows += 1
            counter.kept += 1
            counter.noted.update(keeper.reasons(result, "count"))
            counter.noted.update(getattr(result, "notes", ()))
            counter.seen.keep(result)
            if len(trial.sample) < SAMPLE:
                trial.sample.append(result)
        counter.check()
        trial.hints += counter.unusual()
    except UserError as refused:
        trial.refusal = str(refused)
    trial.not_read = tuple(sorted(counter.fields.unread))


def _passed(record: Record | Drop, spec: SourceSpec, keeper: Gatekeeper, splitter: Splitter) -> Record | Drop:
    """The record, if gates and earlier ones let it through."""
    if isinstance(record, Drop):
        return record
    if drop := keeper.drop_of(record):
        return drop
    split = splitter.assign(record, False, spec.id_space or spec.name, keeper.actions["duplicate_prompts"])
    return split if isinstance(split, Drop) else record


def _add_language(trial: Trial) -> None:
    """Write the language into the source where the gate for it would drop none of what was looked at."""
    if adapter_of(trial.spec).language is None and (language := _language(trial.sample)) is not None:
        trial.spec = trial.spec.model_copy(update={"language": language})


def _language(records: Sequence[Record]) -> str | None:
    hangul = [share for record in records if (share := hangul_share(_text(record))) is not None]
    mean = sum(hangul) / len(hangul) if hangul else 0.0
    letters = [character for record in records for character in _text(record)[:1000] if character.isalpha()]
    is_english = mean < FOREIGN and sum(map(str.isascii, letters)) > (1 - FOREIGN) * len(letters)
    if not hangul or not (mean >= MIN_SHARE["ko"] or is_english):
        return None
    language = "ko" if mean >= MIN_SHARE["ko"] else "en"
    check = GATES["language"].check
    assert check is not None
    chats = [replace(record, language=language) for record in records if not isinstance(record, Document)]
    return None if any(check(record) for record in chats) else language


def _text(record: Record) -> str:
    return " ".join(text for text in texts_of(record))
