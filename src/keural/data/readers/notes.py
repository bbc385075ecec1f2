"""What was assumed of a source's files while they were read, and changed in their texts, to be said once.

In: the shape of every file. Out: lines for people.
"""

from dataclasses import dataclass, field

from keural.data.readers.datafile import FileShape

MAX_CLAUSES = 12
"""So many different things are remembered of a source."""


@dataclass
class ReadingNotes:
    """Notes of one source."""

    assumed: dict[str, tuple[str, int]] = field(default_factory=dict)
    """By what was assumed: the first file, and how many there are."""
    undecodable: str = ""
    """The bytes that could not be decoded last, and where."""
    composed: int = 0
    """Records with Hangul that was written letter by letter."""

    def file(self, name: str, shape: FileShape | None) -> None:
        """Take note of a file that is read."""
        for clause in shape.assumed if shape else ():
            self.assume(name, clause)

    def assume(self, name: str, clause: str) -> None:
        """Take note of what was assumed of a file, as the end of a sentence that begins with its name."""
        first, count = self.assumed.get(clause, (name, 0))
        if count or len(self.assumed) < MAX_CLAUSES:
            self.assumed[clause] = first, count + 1

    def lines(self) -> tuple[str, ...]:
        """A line for each thing that was assumed or changed."""
        lines = [
            f"{first} {clause}" if count == 1 else f"{count:,} files (first {first}) {clause}"
            for clause, (first, count) in self.assumed.items()
        ]
        if self.composed:
            records = "1 record" if self.composed == 1 else f"{self.composed:,} records"
            lines.append(f"{records} held Hangul written letter by letter, which is composed (NFC)")
        return tuple(lines)
