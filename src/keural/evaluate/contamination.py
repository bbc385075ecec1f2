"""Which items of an evaluation a model has seen in training, and what it scores on those that it has not.

In: the items as they are looked for in training data (`EvaluationItem`, by the schemas and the index of `data.decontaminate`), and
what each stage was trained on, read back from its token store. Out: for each stage the items that were found, and beside a score
the figures of the clean part. Text that is not there any more is said, not taken for clean.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from keural.data.filtering.ngram_index import ContaminationIndex
from keural.data.loading.corpus import Corpus
from keural.data.records import AnyRecord, Conversation, Document, EvaluationItem, PreferencePair
from keural.data.tokens.texts import stored_texts
from keural.errors import UserError
from keural.evaluate.results.records import TaskResults
from keural.evaluate.statistics.summary import summarize
from keural.files import CheckedFile, fingerprint
from keural.tokenizer import KeuralTokenizer

NGRAM = 13
Asked = Mapping[str, Mapping[str, EvaluationItem]]
"""The items of each task (by its digest) by their ids, as they are looked for."""


@dataclass(frozen=True)
class TrainingText:
    """What a stage was trained on."""

    stage: str
    identity: str
    """Equal for stages with the same data, which is then read once."""
    texts: Callable[[], Iterable[str]]
    """Reads it; raises `UserError` where it is not there any more."""


@dataclass(frozen=True)
class Seen:
    """What was found of the items of an evaluation in one stage's data."""

    items: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Ids of the items that were found, by the digest of their task."""
    unknown: str | None = None
    """Why the data could not be looked through; None where it was."""


@dataclass(frozen=True)
class Search:
    """What was looked for, and what was found in the stages' data."""

    stages: Mapping[str, Seen]
    too_short: Mapping[str, frozenset[str]]
    """Items that are too short to be looked for, by the digest of their task: of these nothing is known."""

    def until(self, stages: Iterable[str]) -> "Search":
        """The same of some stages alone: of one and those that it starts from."""
        return Search({name: self.stages[name] for name in stages if name in self.stages}, self.too_short)


def looked_for(record: AnyRecord) -> EvaluationItem:
    """An item of any task as it is looked for: of a pair both answers count, of a text all that it says."""
    match record:
        case EvaluationItem():
            return record
        case PreferencePair():
            question = "\n".join(turn.text for turn in record.prompt)
            return EvaluationItem(question, record.where, answers=(record.chosen, record.rejected))
        case Conversation():
            return EvaluationItem("\n".join(turn.text for turn in record.messages), record.where)
        case Document():
            return EvaluationItem(record.text, record.where)


def training_text(stage: str, identity: str, corpus: Corpus, tokenizer: KeuralTokenizer) -> TrainingText:
    """A stage's data as prepared, which is read back from its token store."""

    def read() -> Iterator[str]:
        return stored_texts(corpus.open(tokenizer.sha256, tokenizer.vocab_size, "size"), tokenizer)

    return TrainingText(stage, identity, read)


def search(asked: Asked, trained: Sequence[TrainingText], ngram: int = NGRAM, passages: bool = True) -> Search:
    """Look for every item in what each stage was trained on.

    An item counts as seen when one n-gram of it was found, or the whole of a short one, by the rules of `data.decontaminate`.
    """
    named = [(task, replace(item, where=key)) for task, items in asked.items() for key, item in items.items()]
    index = ContaminationIndex(named, ngram, passages)
    known: dict[str, Seen] = {}
    for stage in trained:
        if stage.identity not in known:
            known[stage.identity] = _look(index, stage)
    return Search({stage.stage: known[stage.identity] for stage in trained}, _too_short(index, named))


class SeenFile(CheckedFile):
    """`seen-ID.json` beside results: what a stage's data held of the items of tasks, by their digests."""

    remedy: ClassVar[str] = "delete it and evaluate again"

    identity: str
    ngram: int
    found: dict[str, list[str]]
    too_short: dict[str, list[str]]


def remembered_search(asked: Asked, trained: Sequence[TrainingText], directory: Path) -> Search:
    """As `search`; what was searched before for the same tasks is read from `directory`, what is searched now is kept there."""
    stages: dict[str, Seen] = {}
    too_short: dict[str, frozenset[str]] = {}
    for stage in trained:
        path = directory / f"seen-{fingerprint(stage.identity)[:16]}.json"
        known = SeenFile.find(path)
        if known is None or (known.identity, known.ngram) != (stage.identity, NGRAM):
            known = SeenFile(identity=stage.identity, ngram=NGRAM, found={}, too_short={})
        if missing := {digest: items for digest, items in asked.items() if digest not in known.found}:
            looked = search(missing, [stage])
            if looked.stages[stage.stage].unknown is not None:
                stages[stage.stage] = looked.stages[stage.stage]
                too_short |= looked.too_short
                continue
            new = looked.stages[stage.stage].items
            known.found.update({digest: sorted(new.get(digest, ())) for digest in missing})
            known.too_short.update({digest: sorted(looked.too_short.get(digest, ())) for digest in missing})
            known.write(path)
        stages[stage.stage] = Seen({digest: frozenset(known.found[digest]) for digest in asked})
        too_short |= {digest: frozenset(known.too_short[digest]) for digest in asked}
    return Search(stages, too_short)


def _look(index: ContaminationIndex, stage: TrainingText) -> Seen:
    found: dict[str, set[str]] = {}
    try:
        for text in stage.texts():
            for hit in index.find_all(text):
                found.setdefault(hit.set, set()).add(hit.item)
    except UserError as error:
        return Seen(unknown=str(error))
    return Seen({task: frozenset(items) for task, items in found.items()})


def _too_short(index: ContaminationIndex, named: Sequence[tuple[str, EvaluationItem]]) -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = {}
    for task, item in named:
        if not index.looks_for(task, item.where):
            found.setdefault(task, set()).add(item.where)
    return {task: frozenset(items) for task, items in found.items()}


def beside(results: TaskResults, looked: Search) -> dict[str, Any]:
    """What stands beside a task's score.

    Args:
        results: the items as the model answered them.
        looked: what was found in the data of the model's stages (`Search.until`).

    Returns:
        `found`: items that training data held; `by_stage`: the same by stage, where any; `too_short`: items that could not be
        looked for; `unknown`: stages whose data could not be looked through, with the reason; `clean`: score, interval and number
        of the items that were not found (None where none is left; the score itself where none was found); `items`: ids of the
        found ones.
    """
    seen = {name: stage.items.get(results.digest, frozenset()) for name, stage in looked.stages.items()}
    every = frozenset[str]().union(*seen.values())
    found = [item.id for item in results.items if item.id in every]
    clean = [item for item in results.items if item.id not in every]
    return {
        "found": len(found),
        "by_stage": {name: count for name, ids in seen.items() if (count := sum(item.id in ids for item in results.items))},
        "too_short": sum(item.id in looked.too_short.get(results.digest, ()) for item in results.items),
        "unknown": {name: stage.unknown for name, stage in looked.stages.items() if stage.unknown},
        "clean": _figures(replace(results, items=clean)) if clean else None,
        "items": list(dict.fromkeys(found)),
    }


def _figures(results: TaskResults) -> dict[str, Any]:
    found = summarize(results)
    return {"score": found.score, "low": found.low, "high": found.high, "n": found.n}
