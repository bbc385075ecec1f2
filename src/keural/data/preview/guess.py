"""Which adapter reads some rows, and with which options: every adapter that could is tried on them.

In: rows, their format, and the name of what they come from. Out: `Guess`es, the best first, each with how many rows it understands
and which of their fields it reads. Options are proposed from the names of fields; whether they fit is found out by reading.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from keural.data.adapters import ADAPTERS, Adapter, conversations, documents, preferences
from keural.data.adapters.base import UNDECLARED, holds, lookup, plain
from keural.data.adapters.evaluation import SCHEMAS, Schema
from keural.data.adapters.turns import CONTENT_KEYS, IN_ORDER, ROLE_KEYS, ROLES, is_round, listing
from keural.data.readers.datafile import Row
from keural.data.readers.magic import TAR, ZIP
from keural.data.records import Drop
from keural.data.source_counts import NOT_DEFECTS
from keural.errors import UserError
from keural.recipe import SourceSpec

MAX_ROWS = 200
"""So many rows every adapter is tried on."""
ARCHIVES = (ZIP, TAR)
"""Formats of which the rows are those of the files inside, of whatever format these are."""
CHATS = {**conversations.ADAPTERS, **preferences.ADAPTERS}
GENERAL = {**conversations.ADAPTERS, **preferences.ADAPTERS, **documents.ADAPTERS}
"""Adapters of shapes; the others are of sets by name."""
SIDE_FIELDS = re.compile(
    r"(?:.*[_ -])?(?:ids?|idx|index|key|uuid|hash|sha\d*|url|link|source|split|date|time|timestamp|created|lang|language|licen[cs]e"
    r"|category|domain|topic|subject|type|model|generator|author|user_?name|count|num.*|n_.*|len.*|score.*|rating.*|meta(?:data)?)",
    re.IGNORECASE,
)
"""Names of fields that say something of a row beside what it is; an adapter need not read them."""
_QUESTIONS = (
    "question", "query", "prompt", "instruction", "input", "user", "human", "problem", "request", "ask", "q", "source", "src",
    "질문", "질의", "문제", "물음", "지시", "명령", "입력", "사용자", "프롬프트",
)  # fmt: skip
_ANSWERS = (
    "answer", "response", "output", "completion", "reply", "assistant", "bot", "gpt", "solution", "target", "tgt", "a",
    "답변", "정답", "응답", "대답", "답", "출력", "챗봇",
)  # fmt: skip
_TEXTS = (
    "text", "content", "body", "document", "article", "passage", "story", "raw", "sentence", "review", "paragraph", "code",
    "본문", "내용", "문서", "텍스트", "기사", "원문", "문장", "리뷰",
)  # fmt: skip
_CHOSEN = ("chosen", "preferred", "better", "accepted", "winner", "win", "positive", "good", "선택", "선호")
_REJECTED = ("rejected", "dispreferred", "worse", "refused", "loser", "lose", "negative", "bad", "거절", "비선호")
_PASSAGES = ("context", "passage", "paragraph", "document", "text", "article", "지문", "본문", "문맥", "문서")
_PREFERRED = ("label", "preference", "preferred", "winner", "choice", "better", "best", "annotator", "선호", "선택")
_SCORES = ("score", "rating", "reward", "rank", "ranking", "vote", "votes", "upvotes", "likes", "점수", "순위", "추천")
_RANKS = ("rank", "ranking", "순위")
"""Of these the names of numbers of which the lowest is the best."""
_SEVERAL = ("response", "answer", "completion", "output", "candidate", "choice", "generation", "답변", "응답")
REPAIRS: dict[str, dict[str, Any]] = {
    "assistant_first": {"assistant_first": "keep"},
    "system_inside": {"system_inside": "merge"},
    "not_alternating": {"consecutive": "merge"},
    "several_answers": {"pairs": "all"},
}
"""Options that keep rows of which an adapter says why it drops them."""
_ORDER = {name: place for place, name in enumerate(sorted(GENERAL, key=lambda name: name != "kto"))}
"""Which of several that fit alike is named."""
_RUNNING = 0.5
"""How much less running text is worth that only happens to be the longest field."""
_FIRST_OF_SEVERAL = 0.2
"""How much less it is worth to take the first of a list."""
_SHAPE_ALONE = 0.3
"""What it is worth to read every field of rows that are dropped for what is in them: it is said why, and what can be done."""
_WHOLE_SHAPE = 0.9
"""The same where the adapter has a name for every field; another that drops nothing may have left out what carries meaning."""
_SPEAKERS = ("speaker", "author", "sender", "user", "name", "who", "화자")
_UTTERANCES = ("text", "message", "utterance", "body", "said", "발화", "내용")
_LANGUAGES = {"en": "영어", "ko": "한국어", "english": "영어", "korean": "한국어", "kor": "한국어", "eng": "영어"}


@dataclass(frozen=True)
class Guess:
    """One adapter with options, and what it does with the rows that it was tried on."""

    adapter: str
    options: dict[str, Any]
    kept: int
    understood: int
    """Rows that are kept, or dropped for what they say and not for a defect."""
    rows: int
    fields: tuple[str, ...]
    """Fields of the rows that it reads."""
    unread: tuple[str, ...]
    """Fields that say what a row is, and that it does not read."""
    named: bool
    """Whether the path names the set that the adapter is of."""
    format_name: str
    """Of the rows; some formats have an adapter of their own."""
    reasons: tuple[tuple[str, int], ...] = ()
    """Why rows are dropped, most frequent first."""
    has_turns: bool = False
    """Whether what it reads as turns is a list of objects."""

    @property
    def fits(self) -> bool:
        """Whether it keeps a row, or reads most of the fields although something in every row is not as it should be."""
        undeclared = any(reason == UNDECLARED for reason, _ in self.reasons)
        enough = undeclared or self.has_turns or len(self.fields) > 1
        reads_most = len(self.fields) > len(self.unread) and enough and not self.lacks
        return self.kept > 0 or (reads_most and self.adapter in CHATS)

    @property
    def lacks(self) -> bool:
        """Whether rows are not of the adapter's shape: most often they have not what it needs."""
        lacking = ("missing_", "wrong_schema", *(() if self.has_turns else ("malformed_row",)))
        return bool(self.reasons) and self.reasons[0][0].startswith(lacking)

    @property
    def score(self) -> float:
        """How well it fits: rows that are understood, weighted by how much of them is read."""
        read = len(self.fields) / (len(self.fields) + len(self.unread)) if self.fields or self.unread else 0.5
        general = 0.0 if self.adapter in GENERAL else 0.5 if self.named else -0.3
        if self.adapter == self.format_name:
            general += 0.5
        if self.adapter == "text" and str(self.options.get("field", "text")).lower() not in _TEXTS:
            general -= _RUNNING
        general -= _FIRST_OF_SEVERAL if any(re.search(r"\.0\b", str(value)) for value in self.options.values()) else 0.0
        whole = not self.unread and not self.options and not self.lacks
        shape = 0.0 if self.adapter not in CHATS else _WHOLE_SHAPE if whole else _SHAPE_ALONE * read
        return max(self.understood / self.rows * (0.5 + read / 2), shape) + general - 0.01 * len(self.options)

    def described(self) -> str:
        """The guess in a line."""
        options = ", ".join(f"{name}: {value}" for name, value in self.options.items())
        read = f", reads {', '.join(self.fields)}" if self.fields else ""
        return f"{self.adapter}{f' {{{options}}}' if options else ''} keeps {self.kept:,} of {self.rows:,} rows{read}"


@dataclass
class Rows:
    """Some rows of one format, and what is known of their fields."""

    format_name: str
    path: str
    rows: Sequence[Row]

    @cached_property
    def records(self) -> list[dict[Any, Any]]:
        """Rows that are objects."""
        return [row.value for row in self.rows if isinstance(row.value, dict)]

    @cached_property
    def keys(self) -> list[str]:
        """Fields that hold something in some row, in the order in which they are met."""
        return list(dict.fromkeys(str(key) for row in self.records for key, value in row.items() if holds(value)))

    @cached_property
    def telling(self) -> list[str]:
        """Fields that say what a row is: that hold texts, lists or objects, and are not named like something beside it."""
        return [
            key for key in self.keys if not SIDE_FIELDS.fullmatch(key) and any(self._says(row.get(key)) for row in self.records)
        ]

    @staticmethod
    def _says(value: Any) -> bool:
        value = plain(value)
        return isinstance(value, list | dict) or (isinstance(value, str) and not value.replace(".", "").isdecimal())

    def first(self, key: str) -> Any:
        """The first value of a field that holds something."""
        return next((plain(row[key]) for row in self.records if holds(row.get(key))), None)

    def mean_length(self, key: str) -> float:
        """Characters of a field of texts, on average; 0 where it holds other things."""
        texts = [row[key] for row in self.records if isinstance(row.get(key), str)]
        return sum(map(len, texts)) / len(texts) if texts else 0.0


def guesses(rows: Rows, only: str | None = None, options: Mapping[str, Any] | None = None) -> list[Guess]:
    """What reads the rows, the best first; `only` that adapter, with `options` only with these."""
    rows = Rows(rows.format_name, rows.path, [row._replace(value=_composed(row.value)) for row in rows.rows])
    found: dict[tuple[str, str], Guess] = {}
    waiting = list(_proposals(rows, only)) if options is None else [(str(only), dict(options))]
    for name, proposed in waiting:
        given = {option: value for option, value in proposed.items() if ADAPTERS[name].options[option].default != value}
        if (name, repr(given)) in found:
            continue
        guess = found[name, repr(given)] = _tried(rows, name, given)
        if options is None:
            known = ADAPTERS[name].options.keys() - given.keys()
            repairs = [REPAIRS[reason] for reason, _ in guess.reasons if reason in REPAIRS]
            waiting += [(name, {**given, **repair}) for repair in repairs if repair.keys() <= known]
    fitting = [guess for guess in found.values() if guess.fits]
    return sorted(fitting, key=lambda guess: (-round(guess.score, 3), _ORDER.get(guess.adapter, len(_ORDER))))


def _composed(value: Any) -> Any:
    """A row with the names of its fields composed: options name them so, whatever the rows do."""
    if not isinstance(value, dict) or "".join(map(str, value)).isascii():
        return value
    return {unicodedata.normalize("NFC", key) if isinstance(key, str) else key: each for key, each in value.items()}


def _proposals(rows: Rows, only: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    formats = {"text", "jsonl"} if rows.format_name in ARCHIVES else {rows.format_name}
    wanted = [only] if only else [name for name, known in ADAPTERS.items() if formats & set(known.formats)]
    for name in wanted:
        if ADAPTERS[name].rows is None:
            yield name, {}
            if "people" in ADAPTERS[name].options:
                yield name, {"people": True}
    for name, options in [*_turns(rows), *_exchanges(rows), *_pairs(rows), *_texts(rows)]:
        if name in wanted and set(options) <= set(ADAPTERS[name].options):
            yield name, options
    for key in rows.keys:
        items = _objects(rows.first(key))
        if not items or key in _READ_WHOLE or list(_turns_in(key, items)) or any(_scores_or_prefers(name) for name in items[0]):
            continue
        inner = Rows(rows.format_name, rows.path, [*_unfolded(rows, key)])
        for name, options in [*((name, {}) for name in conversations.ADAPTERS), *_exchanges(inner)]:
            reads = fields_read(ADAPTERS[name], SourceSpec(name=name, adapter=name, options=options))
            if name in wanted and "unfold" in ADAPTERS[name].options and reads & items[0].keys():
                yield name, {"unfold": [key], **options}


def _scores_or_prefers(name: Any) -> bool:
    """Whether a field is named like what says which of several answers is the better: these are no records to be learned alike."""
    return bool({*_SCORES, *_PREFERRED, "selected"} & set(re.split(r"[\W_\d]+", _plain_name(str(name)))))


def _unfolded(rows: Rows, key: str) -> Iterator[Row]:
    source = SourceSpec(name="unfolded", adapter="qa", options={"unfold": [key]})
    for row in rows.rows[:MAX_ROWS]:
        yield from (Row(row.where, value) for value in conversations.unfolded(row.value, source) if isinstance(value, dict))


def _tried(rows: Rows, name: str, options: dict[str, Any]) -> Guess:
    """What the adapter does with the rows."""
    source = SourceSpec(name=name, adapter=name, options=options)
    adapter = ADAPTERS[name]
    if adapter.check is not None and adapter.check(source):
        return Guess(name, options, 0, 0, 1, (), (), False, rows.format_name)
    kept = understood = total = 0
    reasons: Counter[str] = Counter()
    for record in converted(adapter, source, rows.rows[:MAX_ROWS]):
        total += 1
        kept += not isinstance(record, Drop)
        understood += not isinstance(record, Drop) or record.reason in NOT_DEFECTS or record.reason == UNDECLARED
        if isinstance(record, Drop):
            reasons[record.reason] += 1
    read = fields_read(adapter, source)
    fields = tuple(key for key in rows.keys if key in read)
    unread = tuple(key for key in rows.telling if key not in read)
    named = name not in GENERAL and _letters(name) in _letters(rows.path)
    turns = adapter.reads(source).turns if adapter.reads is not None and not options.get("unfold") else ()
    return Guess(
        name,
        options,
        kept,
        understood,
        max(total, 1),
        fields,
        unread,
        named,
        rows.format_name,
        tuple(reasons.most_common()),
        any(_holds_objects(rows.first(str(key))) for key in turns),
    )


def _holds_objects(value: Any) -> bool:
    items = listing(value)
    return isinstance(items, list) and any(isinstance(item, dict) for item in items)


def converted(adapter: Adapter, source: SourceSpec, rows: Iterable[Row]) -> Iterator[Any]:
    """Every record or drop of some rows."""
    split = adapter.splitter(source)
    for row in rows:
        for value in [row.value] if split is None else split(row.value, source):
            try:
                yield adapter(value, source, row.where)
            except UserError as error:  # a row that a set by name refuses whole
                yield Drop("wrong_schema", row.where, str(error))


def fields_read(adapter: Adapter, source: SourceSpec) -> frozenset[str]:
    """Fields of a row that an adapter reads with these options, first parts of paths included."""
    if adapter.reads is not None:
        return adapter.reads(source).keys | {str(name) for name in source.options.get("unfold", ())}
    found: set[str] = set()
    for name, option in adapter.options.items():
        if option.names_fields or name in source.options:
            given = source.options.get(name, option.default)
            found |= {str(each) for each in (given if isinstance(given, list | tuple) else [given])}
    return frozenset(part for name in found for part in (name, name.split(".")[0]))


_PLAIN = SourceSpec(name="messages", adapter="messages")
_READ_WHOLE = fields_read(ADAPTERS["messages"], _PLAIN)
"""Fields that mean something beside the turns: no lists of records."""


# Options by the names of fields


def _turns(rows: Rows) -> Iterator[tuple[str, dict[str, Any]]]:
    """Fields that hold lists of objects, as turns."""
    lists = {key: items for key in rows.keys if (items := _objects(rows.first(key)))}
    if rows.rows and not rows.records and (items := _objects(rows.rows[0].value)):
        lists[""] = items
    for key, items in lists.items():
        for options in _turns_in(key, items):
            yield ("sharegpt" if key == "conversations" else "messages"), options


def _turns_in(key: str, items: Sequence[dict[Any, Any]]) -> Iterator[dict[str, Any]]:
    """Options that read the objects of a list as turns."""
    names = list(dict.fromkeys(str(name) for item in items for name in item))
    role = next((name for name in (*ROLE_KEYS, *_SPEAKERS) if name in names), None)
    content = next((name for name in (*CONTENT_KEYS, *_UTTERANCES) if name in names), None)
    options: dict[str, Any] = {} if key in ("messages", "conversations", "") else {"field": key}
    if all(is_round(item, _PLAIN) for item in items):
        yield options
        return
    if role is None or content is None or role == content:
        return
    options |= {} if role in ROLE_KEYS else {"role": role}
    options |= {} if content in CONTENT_KEYS else {"content": content}
    yield options
    if not {str(item.get(role)).strip().lower() for item in items} <= ROLES.keys():
        yield {**options, "roles": IN_ORDER}


def _objects(value: Any) -> list[dict[Any, Any]]:
    items = listing(value)
    return items if isinstance(items, list) and items and all(isinstance(item, dict) for item in items) else []


def _exchanges(rows: Rows) -> Iterator[tuple[str, dict[str, Any]]]:
    """Fields named like a question and an answer."""
    asked, answered = _named(rows, _QUESTIONS), _named(rows, _ANSWERS)
    for question in asked[:3]:
        for answer in [name for name in answered if name != question][:3]:
            inside = _inside(rows.first(answer), answer)
            if isinstance(rows.first(answer), bool):
                yield "qa", {"question": question, "answer": answer, "booleans": _YES_NO[_has_hangul(rows.first(question))]}
            elif inside is not None:
                yield "qa", {"question": question, "answer": inside}
            if question == "instruction":
                given = next((name for name in ("input", "context") if name in rows.keys), None)
                yield (
                    "alpaca",
                    ({"input": given} if given not in (None, "input") else {}) | ({"output": answer} if answer != "output" else {}),
                )
    if not asked and not answered and (columns := [key for key in rows.keys if key.isdecimal() and key in rows.telling]):
        yield from (("qa", {"question": columns[0], "answer": column}) for column in columns[1:3])
        yield "text", {"field": columns[0]}
    for passage in _named(rows, _PASSAGES)[:2]:
        for question in [name for name in asked if name != passage][:1]:
            for answer in [name for name in answered if name not in (question, passage)][:1]:
                yield "squad", {"context": passage, "question": question, "answers": answer}
    languages = [key for key in rows.keys if key.lower() in _LANGUAGES]
    if len(languages) == 2:
        first, second = sorted(languages, key=lambda key: _LANGUAGES[key.lower()] == "한국어")
        yield (
            "qa",
            {
                "question": first,
                "answer": second,
                "template": f"{_LANGUAGES[second.lower()]}로 옮기세요: {{question}}",
            },
        )


_YES_NO = {True: ["예", "아니요"], False: ["yes", "no"]}


def _has_hangul(value: Any) -> bool:
    return isinstance(value, str) and re.search("[가-힣]", value) is not None


def _inside(value: Any, name: str) -> str | None:
    """The name of a text in a field: of a list its first item's, of an object its text."""
    value = listing(value)
    if isinstance(value, list) and value:
        inner = _inside(value[0], "0")
        return None if inner is None else f"{name}.{inner}"
    if isinstance(value, dict):
        return next((f"{name}.{key}" for key in ("text", "content", "value", "answer") if isinstance(value.get(key), str)), None)
    return name


def _pairs(rows: Rows) -> Iterator[tuple[str, dict[str, Any]]]:
    """Fields named like a better and a worse answer."""
    chosen, rejected = _named(rows, _CHOSEN), _named(rows, _REJECTED)
    asked = _named(rows, _QUESTIONS)
    for compared in _compared(rows):
        yield "preference", compared
        answers = compared["answers"] if isinstance(compared["answers"], list) else [compared["answers"]]
        yield from (("preference", {"prompt": name, **compared}) for name in [n for n in asked if n not in answers][:2])
    if rejected and not chosen:
        chosen = [name for name in _named(rows, _ANSWERS) if name not in rejected]
    for better in chosen[:2]:
        for worse in rejected[:2]:
            options = {} if better == "chosen" else {"chosen": better}
            options |= {} if worse == "rejected" else {"rejected": worse}
            yield "preference", options
            for question in [name for name in asked if name not in (better, worse)][:2]:
                yield "preference", {"prompt": question, **options}


def _compared(rows: Rows) -> Iterator[dict[str, Any]]:
    """Options for several answers beside what says which is the better: two columns, or a list."""
    scores = _named(rows, _SCORES)
    labels = [name for name in _named(rows, _PREFERRED, ids=True) if isinstance(rows.first(name), str | int | float)]
    if not _named(rows, _REJECTED):  # what names the chosen one of two
        labels += [name for name in _named(rows, ("chosen",)) if isinstance(rows.first(name), str | int | float)]
    for first, second in _twins(rows.keys):
        is_answer = isinstance(rows.first(first), str) or _objects(rows.first(first))
        if is_answer and not SIDE_FIELDS.fullmatch(re.sub(r"_?[\dabAB]$", "", first)):  # model_a and model_b are no answers
            yield from ({"answers": [first, second], "label": label} for label in labels[:2] if label not in (first, second))
            yield from ({"answers": [first, second], "scores": list(pair), **_direction(pair[0])} for pair in _twins(scores)[:1])
    lists = [name for name in _named(rows, _SEVERAL) if isinstance(value := listing(rows.first(name)), list) and len(value) > 1]
    for name in lists[:2]:
        yield from ({"answers": name, "scores": score, **_direction(score)} for score in scores[:2] if score != name)
        yield from ({"answers": name, "label": label} for label in labels[:2] if label != name)
        items = listing(rows.first(name))
        inside = items[0] if isinstance(items[0], dict) else {}
        yield from (
            {"answers": name, "scores": str(key), **_inner_text(inside), **_direction(str(key))}
            for key in inside
            if {*_SCORES} & set(re.split(r"[\W_\d]+", _plain_name(str(key))))
        )
        judged = [*scores, *labels, *_named(rows, _CHOSEN), *_named(rows, _REJECTED)]
        if not judged and not any(map(_scores_or_prefers, inside)):
            yield {"answers": name, "order": "best_first"}


def _direction(name: str) -> dict[str, Any]:
    """The option for numbers of which the lowest is the best, where their name says that they are such."""
    return {"lower_is_better": True} if set(_RANKS) & set(re.split(r"[\W_\d]+", _plain_name(name))) else {}


def _inner_text(answer: Mapping[Any, Any]) -> dict[str, Any]:
    """The option for the text of an answer that is an object, where it is not found without."""
    known = [key for key in preferences.ANSWER_KEYS if key in answer]
    return {"content": known[0]} if len(known) > 1 else {}


def _twins(names: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of names that differ in a number or letter at their end: answer_a and answer_b, response1 and response2."""
    ends = [("1", "2"), ("0", "1"), ("a", "b"), ("A", "B")]
    found = []
    for name in names:
        for first, second in ends:
            other = name.removesuffix(first) + second
            if name.endswith(first) and other in names and other != name:
                found.append((name, other))
    return found


def _texts(rows: Rows) -> Iterator[tuple[str, dict[str, Any]]]:
    """The field with the running text."""
    named = [name for name in _named(rows, _TEXTS) if rows.mean_length(name)]
    longest = max((key for key in rows.telling if not SIDE_FIELDS.fullmatch(key)), key=rows.mean_length, default=None)
    if not named and longest is not None and rows.mean_length(longest):
        named = [longest]
    for name in named[:2]:
        if name != "text":
            yield "text", {"field": name}


def _named(rows: Rows, names: Sequence[str], ids: bool = False) -> list[str]:
    """Fields whose name is one of some, or has one as a part, in the order of these; with `ids` also those that name an id."""
    side = re.compile(r"(?:.*[_ -])?(?:ids?|idx|index|count|len|length|type)", re.IGNORECASE)
    known = [key for key in rows.keys if ids or not side.fullmatch(key)]
    exact = [key for name in names for key in known if _plain_name(key) in (name, f"{name}s")]
    parts = [key for name in names for key in known if len(name) > 1 and name in re.split(r"[\W_\d]+", _plain_name(key))]
    return list(dict.fromkeys([*exact, *parts]))


def _plain_name(key: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).strip().lower()


def _letters(text: str) -> str:
    return re.sub(r"[\W_]", "", text.lower())


def benchmark_of(rows: Rows) -> str | None:
    """The benchmark of whose fields the rows have every one: question, choices and the rest."""
    for name, schema in SCHEMAS.items():
        if schema.choices and rows.records and all(_is_item(row, schema) for row in rows.records[:3]):
            return name
    return None


def _is_item(row: Any, schema: Schema) -> bool:
    there = [name for name in schema.choices if lookup(row, name) is not None]
    asked = any(lookup(row, name) is not None for name in schema.question)
    return asked and len(there) >= min(2, len(schema.choices)) and all(lookup(row, name) is not None for name in schema.answers)
