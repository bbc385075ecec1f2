"""Mixing by weight: which ranges of a store an epoch is made of.

In: a store whose sections are the sources (or several stores, each a section) and their weights. Out: a `Mixture`, the epoch as a
short list of ranges of the store. A section that is needed 2.4 times is named twice whole and once up to the document at which
0.4 of it is reached; one that is needed 0.3 times is named up to there. So nothing is written twice, other weights need no other
store, and any batch is found in constant time. The sequences of a section stand in the order of a hash of their content, so its
first documents are a fixed random choice.

What is weighed is what batches are made of: tokens, of preference pairs the pairs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from keural.data.tokens.store import TokenStore
from keural.errors import UserError
from keural.files import fingerprint
from keural.recipe import STORES, MixingSpec


class SequenceRange(NamedTuple):
    """Sequences ``first..stop-1`` of a store, which are its tokens ``start..end-1``."""

    first: int
    stop: int
    start: int
    end: int


@dataclass(frozen=True)
class Share:
    """What became of one section's weight, for the table; shares are of the epoch, in tokens or pairs.

    `records` and `tokens` count what the epoch holds, repeats included; `unused_records` and `unused_tokens` what it never shows.
    """

    target: float
    share: float
    repeats: float
    records: int
    tokens: int
    unused_records: int
    unused_tokens: int


@dataclass(frozen=True)
class Mixture:
    """An epoch: ranges of the store one after another (the stream's order shuffles them), and each section's share."""

    ranges: tuple[SequenceRange, ...]
    shares: dict[str, Share]

    @property
    def fingerprint(self) -> str:
        """Of the ranges alone: other weights that come to the same epoch are the same mixture."""
        return fingerprint([list(each) for each in self.ranges])


def allocate(sizes: Mapping[str, int], weights: Mapping[str, float], spec: MixingSpec, unit: str = "tokens") -> dict[str, float]:
    """How much of each section an epoch holds, in `unit`s; `sizes` is how much of it there is.

    Raises `UserError` when a section is empty, or has less than `max_repeat` times its size allows and `scarce` is refuse, or all
    sections together have too little.
    """
    if empty := [name for name in weights if not sizes[name]]:
        raise UserError(f"data.mixing: {empty[0]!r} has nothing to train on (all of it is held out); leave it out")
    limits = {name: spec.max_repeat * size for name, size in sizes.items()}
    total = sum(weights.values())
    possible = {name: limits[name] * total / weight for name, weight in weights.items()}
    scarcest = min(possible, key=lambda name: possible[name])
    epoch = possible[scarcest] if spec.epoch == "scarcest" else float(spec.epoch)
    wanted = {name: epoch * weight / total for name, weight in weights.items()}
    if epoch <= possible[scarcest]:
        return wanted
    if spec.scarce == "refuse":
        raise UserError(
            f"data.mixing: {scarcest!r} should give {wanted[scarcest]:,.0f} {unit} of an epoch of {epoch:,.0f}, but has "
            f"{sizes[scarcest]:,}, at most {spec.max_repeat:g} times; lower epoch to {int(possible[scarcest])}, change its weight, "
            "raise max_repeat, or set scarce: renormalise"
        )
    if epoch > sum(limits.values()):
        raise UserError(
            f"data.mixing: an epoch of {epoch:,.0f} {unit} is more than all sources give at {spec.max_repeat:g} times "
            f"({int(sum(limits.values())):,}); lower epoch or raise max_repeat"
        )
    return _renormalized(limits, weights, epoch)


def _renormalized(limits: Mapping[str, float], weights: Mapping[str, float], epoch: float) -> dict[str, float]:
    """The epoch by weights, where no section gives more than its limit: what is missing is shared among the others."""
    found: dict[str, float] = {}
    while len(found) < len(weights):
        rest = epoch - sum(found.values())
        total = sum(weight for name, weight in weights.items() if name not in found)
        wanted = {name: rest * weight / total for name, weight in weights.items() if name not in found}
        full = {name: limits[name] for name, amount in wanted.items() if amount >= limits[name]}
        found |= full or wanted
    return found


def mix(store: TokenStore, weights: Mapping[str, float], spec: MixingSpec) -> Mixture:
    """The epoch that shows each section of `store` by its weight. Raises `UserError` as `allocate` does."""
    sections = {name: _range(store, first, stop) for name, (first, stop) in store.sections.items() if name in weights}
    sizes = {name: _size(section, store) for name, section in sections.items()}
    wanted = allocate({name: sizes.get(name, 0) for name in weights}, weights, spec, STORES[store.kind].unit)
    ranges = {name: _ranges(store, section, wanted[name], spec.max_repeat) for name, section in sections.items()}
    epoch = sum(_size(each, store) for listed in ranges.values() for each in listed)
    total = sum(weights.values())
    shares = {name: _share(store, sections[name], ranges[name], weights[name] / total, epoch) for name in sections}
    return Mixture(tuple(each for listed in ranges.values() for each in listed), shares)


def _range(store: TokenStore, first: int, stop: int) -> SequenceRange:
    return SequenceRange(first, stop, store.extent(first)[0], store.extent(stop - 1)[1])


def _size(each: SequenceRange, store: TokenStore) -> int:
    """Tokens of a range, or its pairs."""
    if STORES[store.kind].unit == "tokens":
        return each.end - each.start
    return (each.stop - each.first) // store.sequences_per_record


def _ranges(store: TokenStore, section: SequenceRange, wanted: float, max_repeat: float) -> list[SequenceRange]:
    """The section whole as often as it fits into `wanted`, then its beginning."""
    size = _size(section, store)
    whole = min(int(wanted // size), int(max_repeat))
    stop = _cut(store, section, wanted - whole * size, limit=max_repeat * size - whole * size)
    if not whole and stop == section.first:
        stop += store.sequences_per_record  # whatever has a weight is there
    return [section] * whole + ([_range(store, section.first, stop)] if stop > section.first else [])


def _cut(store: TokenStore, section: SequenceRange, amount: float, limit: float) -> int:
    """The sequence before which the beginning of the section ends that is nearest to `amount`, and not above `limit`."""
    if STORES[store.kind].unit != "tokens":
        return min(section.first + store.sequences_per_record * min(round(amount), int(limit)), section.stop)
    position = min(section.start + int(amount), section.end - 1)
    sequence = store.sequence_at(position)
    before, after = (end - section.start for end in store.extent(sequence))
    return sequence + 1 if after <= limit and after - amount < amount - before else sequence


def _share(store: TokenStore, section: SequenceRange, ranges: list[SequenceRange], target: float, epoch: int) -> Share:
    shown = max(ranges, key=lambda each: each.stop)
    amount = sum(_size(each, store) for each in ranges)
    return Share(
        target=target,
        share=amount / epoch,
        repeats=amount / _size(section, store),
        records=sum(each.stop - each.first for each in ranges) // store.sequences_per_record,
        tokens=sum(each.end - each.start for each in ranges),
        unused_records=(section.stop - shown.stop) // store.sequences_per_record,
        unused_tokens=section.end - shown.end,
    )
