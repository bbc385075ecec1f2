"""Records to token sequences: markers, chat rendering, loss masks, and what happens to records that are too long.

In: records and a tokenizer. Out: for each record its sequences (one, or chosen and rejected), or a drop. Documents are `[bos]
ids [eos]` and may have any length; a conversation loses trailing turns until it fits; a pair that does not fit is dropped.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import cast

from keural.data.records import Conversation, Document, Drop, PreferencePair, Record
from keural.recipe import DataSpec
from keural.tokenizer.chatml import ROLES, Message, Rendered, render
from keural.tokenizer.load import KeuralTokenizer

BATCH_CHARACTERS = 1 << 20
"""Records are tokenised together up to this size: SentencePiece is many times faster on batches, and its threads have work."""


@dataclass(frozen=True)
class Encoded:
    """A record's sequences: ids and loss mask (None for documents); `cut_turns` is how many trailing turns were left out."""

    record: Record
    sequences: tuple[tuple[list[int], list[int] | None], ...]
    cut_turns: int = 0


class Encoder:
    """Encodes records for one `DataSpec`."""

    def __init__(self, tokenizer: KeuralTokenizer, spec: DataSpec, threads: int = 1) -> None:
        self.tokenizer, self.threads = tokenizer, threads
        self.length, self.min_characters = spec.sequence_length, spec.min_characters

    def encode(self, records: Iterable[Record | Drop]) -> Iterator[Encoded | Drop]:
        """One result for every record or drop, in order."""
        waiting: list[tuple[Record | Drop, list[str]]] = []
        characters = 0
        for record in records:
            texts = [] if isinstance(record, Drop) else texts_of(record)
            waiting.append((record, texts))
            characters += sum(map(len, texts))
            if characters >= BATCH_CHARACTERS:
                yield from self._together(waiting)
                waiting, characters = [], 0
        yield from self._together(waiting)

    def _together(self, waiting: list[tuple[Record | Drop, list[str]]]) -> Iterator[Encoded | Drop]:
        known = _Known(self.tokenizer, (text for _, texts in waiting for text in texts), self.threads)
        for record, _ in waiting:
            if isinstance(record, Drop):
                yield record
            elif isinstance(record, Document):
                yield self._document(record, known)
            elif isinstance(record, Conversation):
                yield self._conversation(record, known)
            else:
                yield self._pair(record, known)

    def _document(self, record: Document, known: "_Known") -> Encoded | Drop:
        if len(record.text) < self.min_characters:
            return Drop("too_short", record.where)
        return Encoded(record, (([self.tokenizer.bos_id, *known.encode(record.text), self.tokenizer.eos_id], None),))

    def _conversation(self, record: Conversation, known: "_Known") -> Encoded | Drop:
        """The longest beginning that fits and ends with an assistant turn."""
        ids, mask = known.render(record.messages)
        if len(ids) <= self.length:
            return Encoded(record, ((ids, mask),))
        starts = [place for place, token in enumerate(ids) if token == self.tokenizer.im_start_id]
        for turns in range(len(starts) - 1, 0, -1):
            if starts[turns] <= self.length and record.messages[turns - 1].role == "assistant":
                end = starts[turns]
                return Encoded(record, ((ids[:end], mask[:end]),), cut_turns=len(starts) - turns)
        return Drop("too_long", record.where)

    def _pair(self, record: PreferencePair, known: "_Known") -> Encoded | Drop:
        """Both sides with their prompt; only the answer is trained."""
        prompt = known.render(record.prompt, add_generation_prompt=True).ids
        sequences = []
        for answer in (record.chosen, record.rejected):
            ids, mask = known.render([*record.prompt, Message("assistant", answer)])
            sequences.append((ids, [0] * len(prompt) + mask[len(prompt) :]))
        if max(len(ids) for ids, _ in sequences) <= self.length:
            return Encoded(record, tuple(sequences))
        least_answer = 2 + len(known.encode("\n"))  # one token, the end marker, the line end
        return Drop("prompt_too_long" if len(prompt) + least_answer > self.length else "answer_too_long", record.where)


class _Known:
    """A tokenizer as chat rendering needs it, with the ids of some texts worked out in one go."""

    def __init__(self, tokenizer: KeuralTokenizer, texts: Iterable[str], threads: int) -> None:
        self.im_start_id, self.im_end_id = tokenizer.im_start_id, tokenizer.im_end_id
        distinct = list(dict.fromkeys(chain(texts, ("\n", *(f"{role}\n" for role in ROLES)))))
        self._ids = dict(zip(distinct, tokenizer.encode_batch(distinct, threads), strict=True))

    def encode(self, text: str) -> list[int]:
        return self._ids[text]

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> Rendered:
        return render(cast(KeuralTokenizer, self), messages, add_generation_prompt)


def texts_of(record: Record) -> list[str]:
    """Everything a record says, for training a tokenizer."""
    if isinstance(record, Document):
        return [record.text]
    if isinstance(record, Conversation):
        return [message.content for message in record.messages]
    return list(chain((message.content for message in record.prompt), (record.chosen, record.rejected)))
