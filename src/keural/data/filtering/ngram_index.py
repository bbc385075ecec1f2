"""An index of the n-grams of evaluation items, and the search for them in a text.

In: `EvaluationItem`s, then texts. Out: for a text the `Hit` with the most matches, or None.

An n-gram is 13 words of an item, or fewer when they are long: as many as make `ngram` times 5 in weight, where a letter weighs 1,
a Hangul syllable 2 and a digit 3 (an English word has 4.7 letters; an eojeol has particles in it and is worth more than a word).
Items that are shorter are looked for whole, or a question together with its choices or answer; below
`MIN_WEIGHT` nothing is looked for.

Texts are compared as streams of letters and digits (NFKC, case folded); punctuation and white space are no part of them. So it does
not matter how a text is spaced, which in Korean is half a matter of taste, nor how lines are broken. Every position of a text is
looked at, by prefix sums of c[j] * B**j modulo 2**64: the hash of any stretch is a difference of two sums, times B**-start.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from keural.data.permutation import mixed
from keural.data.records import EvaluationItem

UInt64s = NDArray[np.uint64]
WORD_WEIGHT = 5
"""Weight of an average word; an n-gram is full at `ngram` words or at `ngram` times this."""
MIN_WEIGHT = 30
"""What is looked for whole weighs at least this: 15 syllables, 30 letters or 10 digits."""
LONGEST = 256
"""Characters of an n-gram; one that is longer is cut."""
PREFIXES = (10, 24)
"""A stretch is first looked for by as many of its characters; no stretch that weighs `MIN_WEIGHT` has fewer than the smaller."""
BLOCK = 1 << 16
"""Characters searched together; the arrays of one block fit into a processor's cache."""
LABELS = ("", "ABCDEFGHIJ", "1234567890")
"""How the choices of short questions are marked, where they are printed together."""
_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)


class Hit(NamedTuple):
    """An evaluation item in a text: its set, its place there, how many of its n-grams were found, which share, and one in words."""

    set: str
    item: str
    ngrams: int
    share: float
    text: str


class NormalizedText(NamedTuple):
    """A text as it is compared: characters' values, their places in `text`, and `text`, which is normalised."""

    values: UInt64s
    places: NDArray[np.int64]
    text: str


def normalized_text(text: str) -> NormalizedText:
    """The letters and digits of a text. Memory: about 30 bytes per character."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    text = text.casefold()
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    values = _values()[codes]
    places = np.flatnonzero(values)
    return NormalizedText(values[places], places, text)


@lru_cache(maxsize=1)
def _values() -> UInt64s:
    """A random number for every letter and digit of Unicode, 0 for all else: 9 MB, once per process."""
    counted = np.fromiter(map(str.isalnum, map(chr, range(0x110000))), dtype=bool, count=0x110000)
    return np.where(counted, mixed(np.arange(1, 0x110001, dtype=np.uint64)) | np.uint64(1), np.uint64(0))


@lru_cache(maxsize=1)
def _powers() -> tuple[UInt64s, UInt64s]:
    """B**j and B**-j modulo 2**64 for every place of a block."""
    size = BLOCK + LONGEST + 1
    both = []
    for base in (_BASE, _INVERSE):
        factors = np.full(size, base, dtype=np.uint64)
        factors[0] = 1
        both.append(np.cumprod(factors, dtype=np.uint64))
    return both[0], both[1]


def _sums(values: UInt64s) -> UInt64s:
    sums = np.zeros(len(values) + 1, dtype=np.uint64)
    np.cumsum(values * _powers()[0][: len(values)], out=sums[1:])
    return sums


def _hashes(sums: UInt64s, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> UInt64s:
    return (sums[ends] - sums[starts]) * _powers()[1][starts]


class _Words(NamedTuple):
    """The words of a text in its stream: where each begins and ends, and the weight up to each end."""

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    weights: NDArray[np.int64]


def weight_of(text: str) -> int:
    """How much a text says: letters 1, digits 3, Hangul and other characters that are syllables or words 2."""
    return sum(map(_weight, unicodedata.normalize("NFKC", text).casefold()))


def _weight(character: str) -> int:
    if not character.isalnum():
        return 0
    if character.isnumeric() and not "\u3400" <= character <= "\u9fff":
        return 3
    return 2 if "\u2e80" <= character <= "\ud7ff" or character >= "\U00020000" else 1


def _words(stream: NormalizedText) -> _Words:
    spaces = np.cumsum([character.isspace() for character in stream.text])
    word = spaces[stream.places]
    starts = np.flatnonzero(np.diff(word, prepend=-1))
    weights = np.cumsum([0, *(_weight(stream.text[place]) for place in stream.places.tolist())])
    ends = np.append(starts[1:], len(word))
    return _Words(starts, ends, weights)


def _ngrams(words: _Words, size: int) -> Iterator[tuple[int, int]]:
    """Start and end of every n-gram in a stream; none where the text is too short for one."""
    last = 0
    for first, start in enumerate(words.starts.tolist()):
        full = int(np.searchsorted(words.weights, words.weights[start] + size * WORD_WEIGHT))
        last = first + size if first + size <= len(words.starts) else len(words.starts) + 1
        by_weight = int(np.searchsorted(words.ends, full)) + 1
        last = min(last, by_weight)
        if last > len(words.starts):
            return
        yield start, min(int(words.ends[last - 1]), start + LONGEST)


class _Entry(NamedTuple):
    """A stretch to look for: hashes of its first characters and of all, its length, and whether it is an item's whole form."""

    prefix: int
    full: int
    length: int
    whole: bool


def _entries(item: EvaluationItem, size: int, passages: bool) -> Iterator[_Entry]:
    """What is looked for of an item."""
    for text in dict.fromkeys((*((item.passage,) if passages else ()), _with_choices(item, ""), *item.choices, *item.answers)):
        yield from _stretches(text, size, whole=False)
    for answer in item.answers:
        yield from _stretches(f"{item.question} {answer}", size, whole=False)
    if next(_stretches(item.question, size, whole=False), None) is None:
        for form in dict.fromkeys(_short_forms(item)):
            yield from _stretches(form, size, whole=True)


def _with_choices(item: EvaluationItem, labels: str) -> str:
    marked = (f"{labels[place % 10]} {choice}" if labels else choice for place, choice in enumerate(item.choices))
    return " ".join((item.question, *marked))


def _short_forms(item: EvaluationItem) -> Iterator[str]:
    """A short question alone, with its choices as they are printed, and with each choice or answer."""
    yield item.question
    for labels in LABELS:
        yield _with_choices(item, labels)
        if item.choices:
            first = f"{labels[0]} {item.choices[0]}" if labels else item.choices[0]
            yield f"{item.question} {first}"
    for continued in (*item.choices, *item.answers):
        yield f"{item.question} {continued}"


def _stretches(text: str, size: int, whole: bool) -> Iterator[_Entry]:
    """The n-grams of a text, or the whole of it: all of it where it is short, else its n-grams."""
    stream = normalized_text(text)
    stream = NormalizedText(stream.values[:BLOCK], stream.places[:BLOCK], stream.text)
    if not len(stream.values):
        return
    words = _words(stream)
    if whole:
        spans = [(0, len(stream.values))] if words.weights[-1] >= MIN_WEIGHT and len(stream.values) <= LONGEST else []
    else:
        spans = list(_ngrams(words, size))
    if not spans:
        return
    starts, ends = np.array(spans, dtype=np.int64).T
    wide = np.where(ends - starts >= PREFIXES[1], *PREFIXES[::-1])
    sums = _sums(stream.values)
    prefixes, full = _hashes(sums, starts, starts + wide).tolist(), _hashes(sums, starts, ends).tolist()
    for prefix, hashed, length in zip(prefixes, full, (ends - starts).tolist(), strict=True):
        yield _Entry(prefix, hashed, length, whole)


@dataclass(frozen=True)
class _Table:
    """The stretches that begin with a prefix of one length, ordered by it.

    Memory per stretch: at most 23 bytes in the ordered arrays, 16 for a prefix, and up to 32 for the filter.
    """

    width: int
    filter: NDArray[np.bool_]
    shift: np.uint64
    prefixes: UInt64s
    first: NDArray[np.int64]
    full: UInt64s
    length: NDArray[np.uint16]
    item: NDArray[np.int32]
    whole: NDArray[np.bool_]

    @classmethod
    def of(cls, width: int, entries: Sequence[tuple[_Entry, int]]) -> "_Table":
        entries = sorted(entries)
        prefixes, first = np.unique(np.array([entry.prefix for entry, _ in entries], dtype=np.uint64), return_index=True)
        bits = max(10, (16 * len(prefixes)).bit_length())
        shift = np.uint64(64 - bits)
        marked = np.zeros(1 << bits, dtype=bool)
        marked[mixed(prefixes) >> shift] = True
        return cls(
            width,
            marked,
            shift,
            prefixes,
            np.append(first, len(entries)).astype(np.int64),
            np.array([entry.full for entry, _ in entries], dtype=np.uint64),
            np.array([entry.length for entry, _ in entries], dtype=np.uint16),
            np.array([item for _, item in entries], dtype=np.int32),
            np.array([entry.whole for entry, _ in entries], dtype=bool),
        )

    @property
    def num_bytes(self) -> int:
        arrays = (self.filter, self.prefixes, self.first, self.full, self.length, self.item, self.whole)
        return sum(array.nbytes for array in arrays)

    def matches(self, sums: UInt64s) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Entries that are in a block, and where each begins."""
        count = len(sums) - self.width
        if count <= 0 or not len(self.prefixes):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        windows = (sums[self.width :] - sums[: -self.width]) * _powers()[1][:count]
        starts = np.flatnonzero(self.filter[mixed(windows) >> self.shift])
        wanted = windows[starts]
        found = np.minimum(np.searchsorted(self.prefixes, wanted), len(self.prefixes) - 1)
        same = self.prefixes[found] == wanted
        starts, found = starts[same], found[same]
        sizes = self.first[found + 1] - self.first[found]
        entries = np.repeat(self.first[found] - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
        starts = np.repeat(starts, sizes)
        ends = starts + self.length[entries]
        inside = ends < len(sums)
        entries, starts, ends = entries[inside], starts[inside], ends[inside]
        equal = _hashes(sums, starts, ends) == self.full[entries]
        return entries[equal], starts[equal]


class ContaminationIndex:
    """The evaluation items of a recipe, to be looked for in texts. Can be pickled; a process that searches adds 10 MB of tables.

    `items` has the number of items by set; `too_short` of those no form of which is long enough to be looked for.
    """

    def __init__(self, items: Iterable[tuple[str, EvaluationItem]], ngram: int = 13, passages: bool = True) -> None:
        self.items: Counter[str] = Counter()
        self.too_short: Counter[str] = Counter()
        self.first_too_short: dict[str, str] = {}
        self._names: list[tuple[str, str]] = []
        self._sizes: list[int] = []
        entries: list[tuple[_Entry, int]] = []
        for name, item in items:
            self.items[name] += 1
            own = dict.fromkeys(_entries(item, ngram, passages))
            if not own:
                self.too_short[name] += 1
                self.first_too_short.setdefault(name, item.where)
                continue
            entries += [(entry, len(self._names)) for entry in own]
            self._names.append((name, item.where))
            self._sizes.append(len(own))
        self._known = frozenset(self._names)
        self.num_ngrams = len(entries)
        wide = PREFIXES[1]
        self._tables = [
            _Table.of(PREFIXES[0], [pair for pair in entries if pair[0].length < wide]),
            _Table.of(wide, [pair for pair in entries if pair[0].length >= wide]),
        ]

    @property
    def num_bytes(self) -> int:
        """Size of the tables in bytes."""
        return sum(table.num_bytes for table in self._tables)

    def looks_for(self, set_name: str, item: str) -> bool:
        """Whether an item is long enough to be looked for, by its set and its place there."""
        return (set_name, item) in self._known

    def find(self, text: str, min_share: float = 0.0) -> Hit | None:
        """The item of which a text holds the most n-grams, or None. One n-gram is enough when it is an item's whole form or when
        it is at least `min_share` of the item's.
        """
        stream = normalized_text(text)
        found = self._found(stream, min_share)
        best = max(found, key=lambda item: (len(found[item]), -item), default=None)
        return None if best is None else self._hit(best, found[best], stream)

    def find_all(self, text: str, min_share: float = 0.0) -> list[Hit]:
        """Every item that `find` could give of a text, in the order of the items."""
        stream = normalized_text(text)
        found = self._found(stream, min_share)
        return [self._hit(item, found[item], stream) for item in sorted(found)]

    def _found(self, stream: NormalizedText, min_share: float) -> dict[int, dict[tuple[int, int], int]]:
        """The items that a text holds enough of: their entries (table and number) and where each was found first."""
        found: dict[int, dict[tuple[int, int], int]] = {}
        whole: set[int] = set()
        for begin in range(0, max(1, len(stream.values)), BLOCK):
            sums = _sums(stream.values[begin : begin + BLOCK + LONGEST])
            for number, table in enumerate(self._tables):
                for entry, start in zip(*(array.tolist() for array in table.matches(sums)), strict=True):
                    item = int(table.item[entry])
                    found.setdefault(item, {}).setdefault((number, entry), begin + start)
                    if table.whole[entry]:
                        whole.add(item)
        return {item: own for item, own in found.items() if item in whole or len(own) >= min_share * self._sizes[item]}

    def _hit(self, item: int, own: dict[tuple[int, int], int], stream: NormalizedText) -> Hit:
        (number, entry), start = max(own.items(), key=lambda match: int(self._tables[match[0][0]].length[match[0][1]]))
        end = start + int(self._tables[number].length[entry]) - 1
        matched = " ".join(stream.text[stream.places[start] : stream.places[end] + 1].split())
        return Hit(*self._names[item], len(own), len(own) / self._sizes[item], matched)
