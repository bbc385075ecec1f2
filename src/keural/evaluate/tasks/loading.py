"""A task's items, read from its set.

In: a `TaskSpec`, the data directory, the number of examples. Out: a `LoadedTask`: items with their prompts made, how many rows gave
none and why, the digest of all that determines what is asked. Nothing here needs torch.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from keural.data.records import Document, Drop, EvaluationItem, PreferencePair
from keural.data.sources import Source, open_source
from keural.errors import UserError, nearest
from keural.evaluate.generated.made import MadeItems
from keural.evaluate.tasks.items import Draft, Item, Unusable, refuse_no_items
from keural.evaluate.tasks.kinds import KINDS
from keural.evaluate.tasks.pair import paired
from keural.evaluate.tasks.places import find, refuse_missing
from keural.evaluate.tasks.spec import TaskSpec
from keural.evaluate.tasks.template import fill
from keural.files import FileHashes, fingerprint

VERSION = 1
"""Part of every digest; raised when the same settings ask something else."""
LONGEST_CLUSTER = 40
"""Characters; a longer cluster (a passage) is called by its checksum."""


@dataclass(frozen=True)
class LoadedTask:
    """A task that can be asked."""

    spec: TaskSpec
    shots: int
    items: Sequence[Item]
    digest: str
    """Of all that determines what is asked."""
    left_out: Mapping[str, int]
    """Rows that gave no item, by reason."""
    chance: float | None

    def baselines(self, limit: int | None = None) -> dict[str, float]:
        """Scores of who does not read, on the first `limit` items: the length's of pairs, the packers' of texts (slow)."""
        measure = KINDS[self.spec.kind].baselines
        return {} if measure is None else measure(self.items[:limit])


def load(spec: TaskSpec, data: Path | None, shots: int | None = None) -> LoadedTask:
    """Read a task. Raises `UserError` where its set is not there, is another one, or holds nothing that can be asked."""
    number = spec.shots.number if shots is None else shots
    if number and spec.kind == "rolling":
        raise UserError(f"task {spec.name}: texts are read as they stand; leave --shots out")
    source, kind = _opened(spec, data), KINDS[spec.kind]
    contents = [_content(source)]
    left_out: Counter[str] = Counter()
    drafts = list(_drafts(spec, source, left_out))
    if not drafts:
        raise refuse_no_items(spec.name, left_out, _first_problem(spec, source))
    _check_fields(spec, drafts)
    before: Before = _no_examples
    if number:
        pool = None
        if spec.shots.places:
            examples = _opened(spec, data, shots=True)
            contents.append(_content(examples))
            pool = list(_drafts(spec, examples, Counter()))
        before = _examples(spec, number, pool, drafts)
    items = list(_items(spec, drafts, before))
    return LoadedTask(
        spec=spec,
        shots=number,
        items=items,
        digest=fingerprint([VERSION, _determining(spec), number, contents]),
        left_out=dict(left_out),
        chance=kind.chance(items) if spec.chance is None else spec.chance,
    )


def _determining(spec: TaskSpec) -> dict[str, Any]:
    """The settings that determine what is asked: where a set lies is none, its content is."""
    settings = spec.determining("evaluation")
    settings.pop("places", None)
    return settings | {"shots": spec.shots.model_dump(exclude={"places", "number"})}


def _opened(spec: TaskSpec, data: Path | None, shots: bool = False) -> Source | MadeItems:
    """The set of a task, or that of its examples. Raises `UserError`."""
    places = spec.shots.places if shots else spec.places
    if spec.made is not None and not shots:
        return MadeItems(spec.made)
    found = find(spec.name, places, data)
    if found is None:
        raise refuse_missing(spec.name, places, data, "examples" if shots else "set")
    source = open_source(found, data)
    if source.kind not in KINDS[spec.kind].records or (
        source.kind == "evaluation" and spec.kind == "pair" and spec.pairing is None
    ):
        raise UserError(f"task {spec.name}: adapter {found.adapter} gives {source.kind}, of which kind {spec.kind} makes nothing")
    return source


def _content(source: Source | MadeItems) -> list[list[Any]]:
    """What determines the rows: sizes and checksums of the files, wherever they lie; the commit of a hub's set."""
    return [entry[1:] if len(entry) == 3 else entry for entry in source.content(FileHashes())]


Pairs = list[tuple[Any, Draft]]
Before = Callable[[Draft], str]


def _records(spec: TaskSpec, source: Source | MadeItems) -> Iterable[Any]:
    records = source.read_any(seed=0)
    return records if spec.pairing is None else paired(spec.pairing, records)


def _drafts(spec: TaskSpec, source: Source | MadeItems, left_out: Counter[str]) -> Iterator[tuple[Any, Draft]]:
    """What can be asked of a set, row by row; the others are counted."""
    for record in _records(spec, source):
        if isinstance(record, Drop):
            left_out[record.reason] += 1
        elif _is_wanted(spec, record):
            try:
                yield record, _draft(spec, record)
            except Unusable as unusable:
                left_out[unusable.reason] += 1


def _draft(spec: TaskSpec, record: Any) -> Draft:
    """What is asked of a record, with the preamble before it. Raises `Unusable`."""
    draft = KINDS[spec.kind].draft(spec, record)
    try:
        return replace(draft, preamble=fill(spec.preamble, draft.values))
    except ValueError as error:
        raise Unusable("template", str(error)) from error


def _is_wanted(spec: TaskSpec, record: Any) -> bool:
    fields = dict(record.fields) if isinstance(record, EvaluationItem) else {}
    return all(fields.get(name) == value for name, value in spec.where.items())


def _first_problem(spec: TaskSpec, source: Source | MadeItems) -> str:
    """What is wrong with the first row that is, for a set of which nothing can be asked."""
    for record in _records(spec, source):
        if isinstance(record, Drop):
            return f"{record.where}: {record.detail or record.reason}"
        try:
            if _is_wanted(spec, record):
                _draft(spec, record)
        except Unusable as unusable:
            return f"{record.where}: {unusable}"
    return _no_such_part(spec, source) if spec.where else ""


def _no_such_part(spec: TaskSpec, source: Source | MadeItems) -> str:
    """What to say where no row has the values that are wanted: the nearest ones there are."""
    rows = [dict(record.fields) for record in _records(spec, source) if isinstance(record, EvaluationItem)]
    hints = [nearest(wanted, {str(row[name]) for row in rows if row.get(name)}) for name, wanted in spec.where.items()]
    return f"no row has {spec.where}{''.join(hints)}"


def _check_fields(spec: TaskSpec, drafts: Pairs) -> None:
    """Raise `UserError` where items are to be grouped by something that none of them has."""
    known = list(dict.fromkeys(name for _, draft in drafts for name in draft.values))
    for key, name in (("cluster", spec.cluster), ("shots.same", spec.shots.same)):
        if name is not None and name not in known:
            raise UserError(f"task {spec.name}: {key}: no item has {name!r}{nearest(name, known)}; they have {', '.join(known)}")


def _no_examples(draft: Draft) -> str:
    return ""


def _examples(spec: TaskSpec, number: int, pool: Pairs | None, drafts: Pairs) -> Before:
    """Makes the examples before an item, the items in their order; of the task's own items never the asked one."""
    own = pool is None
    groups: dict[Any, list[Draft]] = defaultdict(list)
    for _, other in drafts if pool is None else pool:
        if other.shown is not None:
            groups[other.values.get(spec.shots.same or "")].append(other)
    draw = random.Random(spec.shots.seed)

    def before(draft: Draft) -> str:
        shown = groups[draft.values.get(spec.shots.same or "")]
        if len(shown) < number + own:
            raise UserError(
                f"task {spec.name}: there are {max(0, len(shown) - own):,} examples, and {number} are asked for; give fewer --shots"
            )
        drawn = shown[: number + own] if spec.shots.sampler == "first" else draw.sample(shown, number + own)
        chosen = [other for other in drawn if not own or other is not draft][:number]
        return "".join(f"{other.shown}{spec.between}" for other in chosen)

    return before


def _items(spec: TaskSpec, drafts: Pairs, before: Before) -> Iterator[Item]:
    seen: Counter[str] = Counter()
    for number, (record, draft) in enumerate(drafts):
        digest = _identity(record)
        seen[digest] += 1
        yield Item(
            id=digest if seen[digest] == 1 else f"{digest}-{seen[digest]}",
            number=number,
            cluster=_cluster(spec, record, draft),
            prompt=f"{draft.preamble}{before(draft)}{draft.question}",
            choices=draft.choices,
            right=draft.right,
            record=record,
            values=draft.values,
            messages=draft.messages,
        )


def _identity(record: EvaluationItem | PreferencePair | Document) -> str:
    """Checksum of what a record says, wherever it stands."""
    said = {name: value for name, value in asdict(record).items() if name != "where"}
    return fingerprint(said)[:16]


def _cluster(spec: TaskSpec, record: Any, draft: Draft) -> str | None:
    if spec.cluster is None:
        return None
    value = str(draft.values.get(spec.cluster, ""))
    return value if len(value) <= LONGEST_CLUSTER else fingerprint(value)[:12]
