"""Records to token sequences: markers, chat rendering, loss masks, and what happens to records that are too long.

In: records and a tokenizer. Out: for each record its sequences (one, or chosen and rejected), or a drop. Documents are `[bos]
ids [eos]` and may have any length; a conversation loses trailing turns until it fits; a pair or a labelled answer that does not fit
is dropped.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import cast

import numpy as np
from numpy.typing import NDArray

from keural.data.records import Conversation, Document, Drop, PreferencePair, Record
from keural.data.tokens.encoding_cache import EncodingCache, Ids
from keural.recipe import DataSpec
from keural.tokenizer.chatml import Rendered, render
from keural.tokenizer.load import KeuralTokenizer
from keural.tokenizer.message import ROLES, Message

BATCH_CHARACTERS = 1 << 20
"""Records are tokenised together up to this size: SentencePiece is many times faster on batches, and Python goes on meanwhile."""
BATCH_RECORDS = 10_000
TextBatch = list[tuple[Record | Drop, list[str]]]
"""Records with the texts of each."""


@dataclass(frozen=True)
class Encoded:
    """A record's sequences: ids and loss mask (None for documents); `cut_turns` is how many trailing turns were left out."""

    record: Record
    sequences: tuple[tuple[list[int] | NDArray[np.int32], list[int] | None], ...]
    cut_turns: int = 0


class Encoder:
    """Encodes records for one `DataSpec`; with `cache` a batch that was encoded before is read from there."""

    def __init__(self, tokenizer: KeuralTokenizer, spec: DataSpec, threads: int = 1, cache: EncodingCache | None = None) -> None:
        self.tokenizer, self.threads, self.cache = tokenizer, threads, cache
        self.length, self.min_characters, self.train_on = spec.sequence_length, spec.min_characters, spec.train_on

    def encode(self, records: Iterable[Record | Drop]) -> Iterator[Encoded | Drop]:
        """One result for every record or drop, in order. `threads` batches are tokenised while an earlier one is used."""
        ahead: deque[tuple[TextBatch, Future[_TextIds]]] = deque()
        with ThreadPoolExecutor(self.threads) as workers:
            for batch in _batches(records):
                ahead.append((batch, workers.submit(self._encode_texts, batch)))
                if len(ahead) > self.threads:
                    yield from self._encoded(*ahead.popleft())
            while ahead:
                yield from self._encoded(*ahead.popleft())

    def _encode_texts(self, batch: TextBatch) -> "_TextIds":
        """The ids of everything that a batch says."""
        texts = list(dict.fromkeys(chain((text for _, texts in batch for text in texts), _CHAT_TEXTS)))
        encode = self.tokenizer.encode_arrays
        ids = encode(texts) if self.cache is None else self.cache.encode(texts, encode)
        return _TextIds(self.tokenizer, dict(zip(texts, ids, strict=True)))

    def _encoded(self, batch: TextBatch, encoded: "Future[_TextIds]") -> Iterator[Encoded | Drop]:
        text_ids = encoded.result()
        for record, _ in batch:
            if isinstance(record, Drop):
                yield record
            elif isinstance(record, Document):
                yield self._document(record, text_ids)
            elif isinstance(record, Conversation):
                yield self._answer(record, text_ids) if record.good is not None else self._conversation(record, text_ids)
            else:
                yield self._pair(record, text_ids)

    def _document(self, record: Document, text_ids: "_TextIds") -> Encoded | Drop:
        if len(record.text) < self.min_characters:
            return Drop("too_short", record.where)
        text = text_ids.ids[record.text]
        ids = np.empty(len(text) + 2, dtype=np.int32)
        ids[0], ids[1:-1], ids[-1] = self.tokenizer.bos_id, text, self.tokenizer.eos_id
        return Encoded(record, ((ids, None),))

    def _conversation(self, record: Conversation, text_ids: "_TextIds") -> Encoded | Drop:
        """The longest beginning that fits, ends with an assistant turn, and holds something that is trained."""
        ids, mask = text_ids.render(with_trained(record.messages, self.train_on))
        if len(ids) <= self.length:
            return Encoded(record, ((ids, mask),)) if any(mask) else Drop("nothing_trained", record.where)
        starts = [place for place, token in enumerate(ids) if token == self.tokenizer.im_start_id]
        for turns in range(len(starts) - 1, 0, -1):
            end = starts[turns]
            if end > self.length or record.messages[turns - 1].role != "assistant":
                continue
            kept = text_ids.render(with_trained(record.messages[:turns], self.train_on))  # the last turn is another one now
            if any(kept.mask):
                return Encoded(record, ((kept.ids, kept.mask),), cut_turns=len(starts) - turns)
        return Drop("too_long", record.where)

    def _pair(self, record: PreferencePair, text_ids: "_TextIds") -> Encoded | Drop:
        """Both sides with their prompt; only the answer is trained."""
        return self._answered(
            record, record.prompt, [Message("assistant", text) for text in (record.chosen, record.rejected)], text_ids
        )

    def _answer(self, record: Conversation, text_ids: "_TextIds") -> Encoded | Drop:
        """The last answer with what comes before it; only the answer is trained."""
        return self._answered(record, record.messages[:-1], record.messages[-1:], text_ids)

    def _answered(
        self, record: Record, asked: Sequence[Message], answers: Sequence[Message], text_ids: "_TextIds"
    ) -> Encoded | Drop:
        """Each answer after what it answers, whole or not at all."""
        prompt = text_ids.render(asked, add_generation_prompt=True).ids
        sequences = []
        for answer in answers:
            ids, mask = text_ids.render([*asked, answer])
            sequences.append((ids, [0] * len(prompt) + mask[len(prompt) :]))
        if max(len(ids) for ids, _ in sequences) <= self.length:
            return Encoded(record, tuple(sequences))
        least_answer = 2 + len(text_ids.encode("\n"))  # one token, the end marker, the line end
        return Drop("prompt_too_long" if len(prompt) + least_answer > self.length else "answer_too_long", record.where)


def with_trained(messages: Sequence[Message], train_on: str) -> Sequence[Message]:
    """The turns with what `data.train_on` says of them; what a row itself says is not trained stays so."""
    if train_on == "assistant":
        return messages
    if train_on == "all":
        return [turn._replace(trained=True) if turn.trained is None else turn for turn in messages]
    last = max((place for place, turn in enumerate(messages) if turn.role == "assistant"), default=-1)
    return [turn if place == last else turn._replace(trained=False) for place, turn in enumerate(messages)]


_CHAT_TEXTS = ("\n", *(f"{role}\n" for role in ROLES))
"""What chat rendering encodes beside the contents."""


def _batches(records: Iterable[Record | Drop]) -> Iterator[TextBatch]:
    """Records with what each says, in batches of about `BATCH_CHARACTERS`, and of `BATCH_RECORDS` where rows are dropped."""
    waiting: TextBatch = []
    characters = 0
    for record in records:
        texts = [] if isinstance(record, Drop) else texts_of(record)
        waiting.append((record, texts))
        characters += sum(map(len, texts))
        if characters >= BATCH_CHARACTERS or len(waiting) == BATCH_RECORDS:
            yield waiting
            waiting, characters = [], 0
    yield waiting


class _TextIds:
    """A tokenizer as chat rendering needs it, with the ids of some texts worked out in one go."""

    def __init__(self, tokenizer: KeuralTokenizer, ids: dict[str, Ids]) -> None:
        self.im_start_id, self.im_end_id = tokenizer.im_start_id, tokenizer.im_end_id
        self.ids = ids

    def encode(self, text: str) -> list[int]:
        found: list[int] = self.ids[text].tolist()
        return found

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> Rendered:
        return render(cast(KeuralTokenizer, self), messages, add_generation_prompt)


def texts_of(record: Record) -> list[str]:
    """Everything a record says, for training a tokenizer."""
    if isinstance(record, Document):
        return [record.text]
    if isinstance(record, Conversation):
        return _turn_texts(record.messages)
    return [*_turn_texts(record.prompt), record.chosen, record.rejected]


def _turn_texts(messages: Iterable[Message]) -> list[str]:
    return [text for message in messages for text, _ in message.parts()]
