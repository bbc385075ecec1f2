"""Gettext catalogues: a careful reader of `.po` text.

In: the text of one catalogue. Out: its messages in order, without the header, without fuzzy and obsolete ones. The format is
that of the GNU gettext manual, section "The Format of PO Files": comments, `msgctxt`, `msgid`, `msgid_plural`, `msgstr`,
`msgstr[n]`, each with one or more quoted strings that are joined.
"""

import re
from dataclasses import dataclass, field

_KEYWORD = re.compile(r'(msgctxt|msgid_plural|msgid|msgstr)(?:\[(\d{1,3})\])?\s*("[^\n]*)')
_QUOTED = re.compile(r'"((?:[^"\\]++|\\.)*+)"')
_ESCAPE = re.compile(r"\\(x[0-9A-Fa-f]{1,2}|[0-7]{1,3}|.)")
_SIMPLE = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v", '"': '"', "\\": "\\", "'": "'", "?": "?"}


class PoError(ValueError):
    """A catalogue that cannot be read; `line` counts from 1."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"line {line}: {reason}")
        self.line = line


@dataclass
class PoMessage:
    """One message: singular and plural in the source language, and the translations by plural form (one for ordinary messages)."""

    line: int
    source: str = ""
    plural: str | None = None
    translations: dict[int, str] = field(default_factory=dict)
    context: str | None = None


def parse_po(text: str) -> list[PoMessage]:
    """The messages of a catalogue that are neither header, fuzzy nor obsolete; untranslated ones have empty translations.

    Raises `PoError` where the text does not follow the format.
    """
    entries: list[_Entry] = []
    entry = _Entry()
    for number, raw in enumerate(text.split("\n"), start=1):
        line = raw.strip()
        match = _KEYWORD.fullmatch(line)
        if entry.complete and (line.startswith("#") or (match and match[1] in ("msgctxt", "msgid"))):
            entries.append(entry)
            entry = _Entry()
        if line.startswith("#"):
            entry.comment(line)
        elif line.startswith('"'):
            entry.extend(number, line)
        elif match:
            entry.start(number, match[1], match[2], match[3])
        elif line:
            raise PoError(number, f"unexpected {line[:40]!r}")
    if entry.line:
        entries.append(entry)
    messages = [(one.fuzzy, one.message()) for one in entries]
    return [message for fuzzy, message in messages if not fuzzy and (message.source or message.context is not None)]


class _Entry:
    """A message while it is read: its strings by keyword."""

    def __init__(self) -> None:
        self.line = 0
        self.fuzzy = False
        self._strings: dict[str, list[str]] = {}
        self._current = ""

    @property
    def complete(self) -> bool:
        """Whether a translation has been seen: what follows may be the next message."""
        return any(name.startswith("msgstr") for name in self._strings)

    def comment(self, line: str) -> None:
        """Take the fuzzy flag; an obsolete message is all comments, and the flag before it is its own."""
        if line.startswith("#,"):
            self.fuzzy = self.fuzzy or "fuzzy" in re.split(r"[,\s]+", line[2:])
        elif line.startswith("#~"):
            self.fuzzy = False

    def start(self, number: int, name: str, index: str | None, quoted: str) -> None:
        """Begin a string: `msgid "..."`, `msgstr[1] "..."`."""
        self._current = f"msgstr[{index or 0}]" if name == "msgstr" else name
        if self._current in self._strings:
            raise PoError(number, f"{name} is given twice")
        if name not in ("msgctxt", "msgid") and "msgid" not in self._strings:
            raise PoError(number, f"{name} without msgid")
        self.line = self.line or number
        self._strings[self._current] = [_unquote(number, quoted)]

    def extend(self, number: int, quoted: str) -> None:
        """Add a further quoted string to the keyword before it."""
        if not self._current:
            raise PoError(number, "a string without a keyword")
        self._strings[self._current].append(_unquote(number, quoted))

    def message(self) -> PoMessage:
        """The finished message."""
        if not self.complete:
            raise PoError(self.line, "a message without msgstr")
        texts = {name: "".join(pieces) for name, pieces in self._strings.items()}
        translations = {int(name[7:-1]): text for name, text in texts.items() if name.startswith("msgstr")}
        return PoMessage(self.line, texts["msgid"], texts.get("msgid_plural"), translations, texts.get("msgctxt"))


def _unquote(number: int, quoted: str) -> str:
    match = _QUOTED.fullmatch(quoted)
    if not match:
        raise PoError(number, f"not a quoted string: {quoted[:40]!r}")
    return _ESCAPE.sub(_escaped, match[1])


def _escaped(match: re.Match[str]) -> str:
    code = match[1]
    if code in _SIMPLE:
        return _SIMPLE[code]
    if code[0] == "x" and len(code) > 1:
        return chr(int(code[1:], 16))
    return chr(int(code, 8) & 0xFF) if code[0] in "01234567" else match[0]
