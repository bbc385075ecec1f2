"""How many bits a text takes, per byte of it.

In: documents. Out: requests that together predict every token of a text once, `</s>` at its end included, in windows that overlap;
and the sum in bits, with the text's bytes beside it. `xz -9` and, where a library has it, `zstd -19` say what the same bytes take
without a model.
"""

import math
from collections.abc import Sequence
from typing import Any

from keural.data.records import Document
from keural.evaluate.packers import packed_bits_per_byte
from keural.evaluate.results.records import ItemResult
from keural.evaluate.tasks.asking import Asking
from keural.evaluate.tasks.items import Draft, Item, Likelihood, LogProb, Unusable
from keural.evaluate.tasks.spec import TaskSpec
from keural.evaluate.windows import windows

SHOWN = 500
"""Characters of a text that its record keeps."""


def draft(spec: TaskSpec, record: Document) -> Draft:
    """The text itself. Raises `Unusable` for an empty one."""
    if not record.text:
        raise Unusable("empty")
    return Draft(record.text)


def requests(spec: TaskSpec, item: Item, asking: Asking) -> tuple[list[Likelihood], dict[str, Any]]:
    """The windows of a text. Raises `Unusable` for a window that the model cannot read."""
    if asking.prompting == "chat":
        raise Unusable("not_for_chats", "texts are read as they stand")
    tokenizer = asking.tokenizer
    length = min(spec.window.length or asking.context_length, asking.context_length)
    overlap = min(int(length * spec.window.overlap), length - 1)
    ids = [tokenizer.bos_id, *tokenizer.encode(item.prompt), tokenizer.eos_id]
    places = windows(len(ids), length, overlap)
    found = [Likelihood(tuple(ids[start:first]), tuple(ids[first:stop])) for start, first, stop in places]
    return found, {"window": length, "overlap": overlap}


def judge(spec: TaskSpec, item: Item, asked: Sequence[Likelihood], found: Sequence[LogProb], details: dict[str, Any]) -> ItemResult:
    """The bits of a text."""
    bits = -sum(each.total for each in found) / math.log(2)
    size = len(item.prompt.encode())
    predicted = sum(len(request.continuation) for request in asked)
    return ItemResult(
        id=item.id,
        cluster=item.cluster,
        score=bits,
        question=item.prompt[:SHOWN],
        expected="",
        given="",
        logprobs=None,
        tokens=sum(request.length for request in asked),
        details={"bytes": size, "predicted_tokens": predicted, "bits_per_byte": bits / size, **details},
    )


def baselines(items: Sequence[Item]) -> dict[str, float]:
    """Bits per byte of the texts one after the other, packed by programs."""
    return packed_bits_per_byte([item.prompt for item in items])
