"""Choosing the next token.

In: the logits after the last token of each answer, and each answer's `Sampler`. Out: token ids. Every engine samples here, so that
the same logits and seed give the same text everywhere, whatever else is being answered. Order and definitions are those of
transformers' processors: repetition penalty, temperature, nucleus.
"""

import functools
import math
import random
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keural.errors import UserError
from keural.serve.engines.sampling_params import SamplingParams

GREEDY_BELOW = 1e-5
"""A temperature this small is taken as 0: logits divided by it would overflow."""
ENOUGH = 1e-9
"""A nucleus may miss `top_p` by so little: more than sums in float64 differ by between processors, so that none of them takes a
token more where the sum is `top_p` exactly, as among equally probable tokens."""
LOW_BITS = 16
"""The bits of a float32 above these, its exponent and seven bits of its mantissa, number the buckets: 128 for each factor of 2."""
BUCKETS = (int(np.float32(1).view(np.int32)) >> LOW_BITS) + 1
"""Weights are at most 1."""

NOT_FINITE = "the model's logits are not finite: its weights are damaged, or its precision is too small for them"
UNLIKELY, FEW = 3000, 8192
"""The token is first looked for among those with more than so small a part of the mass that comes after it, where they are few:
sorting so few is quicker than numbering buckets."""
WARM = 0.5
"""From this temperature on weights are summed without being compared with the best one first: one pass less over a row."""
TRIALS = 5
"""Of each way to make weights of exponents; the quickest counts."""
ROUGHLY = 1e-5
"""Weights summed in float32 miss their sum by less than this part of it: a million of them, added up pairwise in eight lanes, by 32
roundings, 1.9e-6, and those that were not compared with the best one by two more of the exponent, 3.5e-6 where it is up to 28."""
LEAST_MASS, LARGEST_MASS = 1e-8, 1e12
"""Sums that weights may have which were not compared with the best one: its exponent is between -31 and 28, so that others are
neither beyond float32 nor, where they count, below what it holds in full."""
PART = 8192
"""Weights are summed so many at a time: memory for all of them would be asked of the system, and given back, with every token."""

Floats = NDArray[np.float32]
Logits = Tensor | Floats
"""Float32 of a network on any device; or an array, where they lie in the memory of another library: what PyTorch does for a view of
them takes longer, beside a network that empties the caches, than a greedy choice.
"""


class _Room(threading.local):
    """Memory for one row, for each thread: new arrays of this size are asked of the system, and given back, with every token."""

    weights: Floats = np.empty(0, dtype=np.float32)
    marks: NDArray[np.bool_] = np.empty(0, dtype=bool)

    def fit(self, size: int) -> None:
        """Have room for a row of `size` ids."""
        if len(self.weights) != size:
            self.weights, self.marks = np.empty(size, dtype=np.float32), np.empty(size, dtype=bool)


_room = _Room()
quiet = np.errstate(over="ignore")
"""A decorator: numbers beyond float32 come up here and are looked at, so NumPy need not warn of them. Saying so for every token
takes a tenth of what a greedy choice does.
"""


class Sampler:
    """Chooses the tokens of one answer: its settings, the tokens that it has seen, and a generator of its own.

    One uniform number is drawn for every token, also for a greedy one, so that a seeded answer depends on its logits alone.
    """

    def __init__(self, sampling: SamplingParams, prompt_ids: Sequence[int], vocab_size: int) -> None:
        self.sampling = sampling
        penalty = sampling.repetition_penalty
        self.divisors = np.array([1 / penalty, penalty], dtype=np.float32)
        """Of the logits that are not above 0, and of those that are, among tokens that were seen."""
        self._numbers = random.Random(sampling.seed)  # Python keeps what a seed gives from release to release
        self.is_seen = np.zeros(vocab_size, dtype=bool)
        """Marks `[V]` of the ids of the prompt and of the answer so far."""
        self.is_seen[np.asarray(prompt_ids, dtype=np.int64)] = True
        self._seen = np.flatnonzero(self.is_seen)
        self._count = len(self._seen)

    @property
    def seen(self) -> NDArray[np.int64]:
        """The marked ids, each once, in no order."""
        return self._seen[: self._count]

    def see(self, token: int) -> None:
        """Add a token of the answer."""
        if self.is_seen[token]:
            return
        if self._count == len(self._seen):
            self._seen = np.concatenate([self._seen, np.zeros(len(self._seen) + 16, dtype=np.int64)])
        self.is_seen[token] = True
        self._seen[self._count] = token
        self._count += 1

    def uniform(self) -> float:
        """The next random number, from 0 up to but not including 1."""
        return self._numbers.random()


@quiet
def choose(logits: Logits, samplers: Sequence[Sampler]) -> list[int]:
    """The next token of each answer, which its sampler has then seen. `logits` `[N, V]`, one row a sampler, are left as they were.

    With temperature 0 it is the most probable token after the repetition penalty; of equally probable ones the first. Otherwise one
    of the nucleus: the smallest set of most probable tokens whose probability reaches `top_p` (Holtzman et al. 2020, eq. 2-3), at
    least one token.

    A logit of minus infinity is a token that may not come.

    Raises:
        UserError: where a logit is not a number or infinite, or all are minus infinity, perhaps by the penalty alone.
    """
    tokens = choose_where_possible(logits, samplers)
    if None in tokens:
        raise UserError(NOT_FINITE)
    return [token for token in tokens if token is not None]


def choose_where_possible(logits: Logits | Sequence[Logits], samplers: Sequence[Sampler]) -> list[int | None]:
    """See `choose`; None for a row of which it would raise, so that one answer's settings cost no other one its token. The rows
    may be a list of them, each where it lies. Whoever calls it is `quiet`.
    """
    if len(logits) != len(samplers):
        raise ValueError(f"{len(logits)} rows of logits for {len(samplers)} answers")
    rows = _in_memory(logits)
    if rows is not None:
        tokens = [choose_row(row, sampler) for row, sampler in zip(rows, samplers, strict=True)]
    else:
        tokens = choose_by_sorting(_together(logits), samplers)
    for token, sampler in zip(tokens, samplers, strict=True):
        if token is not None:
            sampler.see(token)
    return tokens


def have_best(logits: Logits) -> list[bool]:
    """For each row of `logits` `[N, V]` whether it has a most probable token: not where a logit is not a number or infinite, nor
    where all are minus infinity.
    """
    rows = _in_memory(logits)
    if rows is not None:
        return [math.isfinite(np.maximum.reduce(row)) for row in rows]
    found: list[bool] = torch.isfinite(torch.as_tensor(logits).amax(dim=-1)).tolist()
    return found


def _in_memory(logits: Logits | Sequence[Logits]) -> Floats | list[Floats] | None:
    """The same rows for NumPy; None where they lie in the memory of an accelerator."""
    if isinstance(logits, np.ndarray):
        return logits
    if isinstance(logits, Tensor):
        return logits.numpy() if logits.device.type == "cpu" else None
    rows = [_in_memory(row) for row in logits]
    return None if any(row is None for row in rows) else rows  # type: ignore[return-value]


def _together(logits: Logits | Sequence[Logits]) -> Tensor:
    """Rows as one tensor `[N, V]`."""
    if isinstance(logits, Tensor | np.ndarray):
        return torch.as_tensor(logits)
    return torch.stack([torch.as_tensor(row) for row in logits])


def choose_row(logits: Floats, sampler: Sampler) -> int | None:
    """See `choose_where_possible`; one row `[V]`, in the processor's memory. Numbers beyond float32 come up and are looked at: call
    it where they raise no warning.

    What was seen is penalized in the row itself, and put back: a copy of the row costs as much as a greedy choice.
    """
    number, sampling, seen = sampler.uniform(), sampler.sampling, sampler.seen
    if sampling.repetition_penalty == 1 or not len(seen):
        return _of_scores(logits, sampling, number)
    before = logits[seen]
    try:
        logits[seen] = _penalized(before, sampler.divisors)
        return _of_scores(logits, sampling, number)
    finally:
        logits[seen] = before


def _penalized(logits: Floats, divisors: Floats) -> Floats:
    """Logits of tokens that are made less likely (Keskar et al. 2019, section 4.1, with the sign taken into account): positive ones
    are divided by the penalty, the second of the divisors, others multiplied, which is to be divided by the first.
    """
    return np.divide(logits, divisors[np.greater(logits, 0).view(np.int8)])


def _of_scores(scores: Floats, sampling: SamplingParams, number: float) -> int | None:
    """The token at the part `number` of what may come, by penalized logits `[V]`; None where the best is not finite."""
    if sampling.temperature < GREEDY_BELOW:
        best = int(scores.argmax())  # of a NaN, where there is one
        return best if math.isfinite(scores[best]) else None
    temperature = np.float32(sampling.temperature)
    _room.fit(len(scores))
    zero, top_p, whole = np.float32(0), sampling.top_p, 0.0
    if top_p < 1 and sampling.temperature >= WARM:
        whole = _rough_mass(scores, zero, temperature)
    if not LEAST_MASS < whole < LARGEST_MASS:  # nor if it is no number
        zero = scores[scores.argmax()]
        if not math.isfinite(zero):
            return None
        whole = _rough_mass(scores, zero, temperature) if top_p < 1 else 0.0
    found = _of_few(scores, zero, whole, temperature, top_p, number) if top_p < 1 else None
    if found is None:
        weights = _weights(scores, scores[scores.argmax()], temperature, _room.weights)
        found = _of_nucleus(scores, weights, top_p, number)
    return found


def _weights(scores: Floats, zero: np.float32, temperature: np.float32, out: Floats) -> Floats:
    """Probabilities up to a factor, that of the score `zero` 1, in `out`."""
    if zero:
        scores = np.subtract(scores, zero, out=out)
    np.divide(scores, temperature, out=out)
    return np.exp(out, out=out)


def _rough_weights(scores: Floats, zero: np.float32, temperature: np.float32, out: Floats) -> Floats:
    """The same up to `ROUGHLY`, as this processor does it sooner."""
    power = _quickest_power()
    if zero:
        scores = np.subtract(scores, zero, out=out)
    np.multiply(scores, np.float32(POWERS[power] / temperature), out=out)
    power(out)
    return out


def _exp(exponents: Floats) -> None:
    np.exp(exponents, out=exponents)


def _exp2(exponents: Floats) -> None:
    np.exp2(exponents, out=exponents)


def _exp2_by_torch(exponents: Floats) -> None:
    torch.from_numpy(exponents).exp2_()


Power = Callable[[Floats], None]
POWERS: dict[Power, float] = {_exp: 1.0, _exp2: 1 / math.log(2), _exp2_by_torch: 1 / math.log(2)}
"""What makes weights of exponents, in their place, and by how much these are multiplied before."""


@functools.cache
def _quickest_power() -> Power:
    """The one of `POWERS` that takes the least time here. NumPy has powers of 2 for a processor's widest vectors; for others they
    take several times as long, and PyTorch's half as long as NumPy's of e. All give the same tokens.
    """
    seconds: dict[Power, float] = {}
    for power in [*POWERS] * TRIALS:
        exponents = np.linspace(-20, 20, PART, dtype=np.float32)
        begun = time.perf_counter()
        power(exponents)
        seconds[power] = min(seconds.get(power, math.inf), time.perf_counter() - begun)
    return min(seconds, key=seconds.__getitem__)


def _of_few(scores: Floats, zero: np.float32, whole: float, temperature: np.float32, top_p: float, number: float) -> int | None:
    """See `_of_nucleus`; from the few tokens that are likely. The sum of all weights, of which a score of `zero` has 1, is `whole`
    up to `ROUGHLY`.

    None where likely tokens are many, and where it takes the exact sum to say which token it is: the rough one gives two bounds,
    and nearly always both lead to the same token.
    """
    least = (1 - top_p * number) * whole / UNLIKELY
    (tokens,) = np.greater(scores, zero + temperature * np.float32(math.log(least)), out=_room.marks).nonzero()
    if not 0 < len(tokens) <= FEW:
        return None
    likely = scores[tokens]
    rising = np.sort(likely)
    sums = _rough_weights(rising[::-1], zero, temperature, np.empty_like(rising)).cumsum(dtype=np.float64)
    wanted = (top_p - ENOUGH) * whole
    rank = _rank(sums, wanted * (1 - ROUGHLY), 0.0, number * (1 - ROUGHLY))
    if rank == len(sums) or rank != _rank(sums, wanted * (1 + ROUGHLY), least, number * (1 + ROUGHLY)):
        return None
    # Sorting scores is quicker than sorting places; among equally probable tokens the lowest id comes first.
    score = rising[-1 - rank]
    first = len(rising) - bisect_right(rising, score)
    return int(tokens[(likely == score).nonzero()[0][rank - first]])


def _rough_mass(scores: Floats, zero: np.float32, temperature: np.float32) -> float:
    """The sum of the tokens' `_weights`, up to `ROUGHLY`."""
    return float(np.add.reduce(_rough_weights(scores, zero, temperature, _room.weights)))


def _rank(sums: NDArray[np.float64], wanted: float, next_weight: float, number: float) -> int:
    """Where the token at the part `number` of the nucleus is among the likely ones, which have these `sums`, if the nucleus ends
    where they reach `wanted`, or behind them with a token of the next weight.
    """
    end = bisect_left(sums, wanted)
    mass = sums[end] if end < len(sums) else wanted + next_weight
    return min(bisect_right(sums, number * mass), end)


def _of_nucleus(scores: Floats, weights: Floats, top_p: float, number: float) -> int:
    """The token at the part `number` of the nucleus's mass; `weights` `[V]` are probabilities up to a factor, the largest 1.

    Tokens are in the order of their `scores` `[V]`, of their id where these are equal. Sorting a large vocabulary takes longer than
    a step of a small model. So the masses of buckets of similar weights are summed, in float64, and only the two buckets are sorted
    in which the nucleus and the token end. The weights up to (1 - top_p) / 2V of the whole mass have together at most half of
    what the nucleus may leave out, and are left out before.
    """
    if top_p >= 1:
        ranked = _Ranked(scores, weights)
        return ranked.index(ranked.at(number * ranked.mass, "right")[0])
    whole = float(weights.sum(dtype=np.float64))
    least = np.float32((1 - top_p) * whole / (2 * len(weights)))
    tokens = np.flatnonzero(np.greater(weights, least, out=_room.marks))
    ranked = _Ranked(scores[tokens], weights[tokens])
    last, mass = ranked.at((top_p - ENOUGH) * whole, "left")
    drawn, _ = ranked.at(number * mass, "right")
    return int(tokens[ranked.index(min(drawn, last))])


Rank = tuple[int, int]
"""A bucket, and a place among its weights; ranks are ordered as what they stand for, largest weights first."""


class _Ranked:
    """Weights `[N]`, at most 1, by their scores `[N]`, largest first, of which only the buckets that are asked for are sorted."""

    def __init__(self, scores: Floats, weights: Floats) -> None:
        self._scores, self._weights = scores, weights
        self._bucket = (BUCKETS - 1) - (weights.view(np.int32) >> LOW_BITS)
        masses = torch.zeros(BUCKETS, dtype=torch.float64)
        for start in range(0, len(weights), PART):
            part = slice(start, start + PART)
            buckets = torch.from_numpy(self._bucket[part].astype(np.int64))
            masses.scatter_add_(0, buckets, torch.from_numpy(weights[part].astype(np.float64)))
        self._up_to: NDArray[np.float64] = masses.cumsum(0).numpy()
        self._sorted: dict[int, NDArray[np.int64]] = {}
        self.mass = float(self._up_to[-1])

    def at(self, mass: float, side: Literal["left", "right"]) -> tuple[Rank, float]:
        """The first rank up to which the weights sum to at least `mass` ("left") or to more ("right"), and that sum."""
        bucket = int(np.searchsorted(self._up_to, min(mass, np.nextafter(self.mass, 0)), side))
        before = float(self._up_to[bucket - 1]) if bucket else 0.0
        sums = before + self._weights[self._in(bucket)].cumsum(dtype=np.float64)
        place = min(int(np.searchsorted(sums, mass, side)), len(sums) - 1)
        return (bucket, place), float(sums[place])

    def index(self, rank: Rank) -> int:
        """Where the weight of that rank stands in `weights`."""
        return int(self._in(rank[0])[rank[1]])

    def _in(self, bucket: int) -> NDArray[np.int64]:
        """Where the weights of a bucket stand, largest score first, as in `_of_few`: unequal scores may have equal weights."""
        if bucket not in self._sorted:
            members = np.flatnonzero(self._bucket == bucket)
            self._sorted[bucket] = members[_falling(self._scores[members])]
        return self._sorted[bucket]


def _falling(scores: Floats) -> NDArray[np.int64]:
    """The places of scores `[N]`, the largest first and of equal ones the first: bits and place as one number, which NumPy sorts
    in a third of the time.
    """
    bits = np.subtract(np.float32(0), scores).view(np.int32)  # of 0 and -0 the same
    rising = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
    keys = (rising.astype(np.int64) << 32) | np.arange(len(scores))
    keys.sort()
    return keys & 0xFFFFFFFF


def choose_by_sorting(logits: Tensor, samplers: Sequence[Sampler]) -> list[int | None]:
    """See `choose_where_possible`; all rows at once, for accelerators, which sort a vocabulary faster than they answer questions
    about it.
    """
    device, rows = logits.device, [sampler.sampling for sampler in samplers]
    numbers = [sampler.uniform() for sampler in samplers]
    scores = _penalized_on_device(logits, samplers)
    best, first = scores.max(dim=-1, keepdim=True)  # NaN, where there is one
    found = first
    if any(row.temperature >= GREEDY_BELOW for row in rows):
        settings = [(row.temperature, row.top_p, number) for row, number in zip(rows, numbers, strict=True)]
        temperature, top_p, number = torch.tensor(settings, dtype=torch.float64).to(device).unsqueeze(-1).unbind(1)
        greedy = temperature < GREEDY_BELOW
        weights = ((scores - best) / temperature.masked_fill(greedy, 1).float()).exp()
        ordered, tokens = weights.sort(dim=-1, descending=True, stable=True)
        sums = ordered.double().cumsum(dim=-1)
        last = torch.searchsorted(sums, (top_p - ENOUGH) * sums[:, -1:])
        last = torch.where(top_p < 1, last, logits.shape[-1]).clamp_max(logits.shape[-1] - 1)
        drawn = torch.searchsorted(sums, number * sums.gather(-1, last), right=True)
        found = torch.where(greedy, first, tokens.gather(-1, torch.minimum(drawn, last)))
    chosen: list[int] = found.masked_fill(~torch.isfinite(best), -1)[:, 0].tolist()
    return [None if token < 0 else token for token in chosen]


def _penalized_on_device(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """See `_penalized`; rows `[N, V]` as they are, or a copy. Only the ids that were seen travel to the device."""
    seen = [sampler.seen if sampler.sampling.repetition_penalty != 1 else sampler.seen[:0] for sampler in samplers]
    longest = max(map(len, seen))
    if not longest:
        return logits
    ids = np.zeros((len(seen), longest), dtype=np.int64)
    penalties = np.ones((len(seen), 1), dtype=np.float32)
    for row, (sampler, some) in enumerate(zip(samplers, seen, strict=True)):
        if len(some):
            ids[row, : len(some)], ids[row, len(some) :] = some, some[0]
            penalties[row] = sampler.sampling.repetition_penalty
    places, penalty = (torch.from_numpy(each).to(logits.device) for each in (ids, penalties))
    scores = logits.gather(1, places)
    return logits.scatter(1, places, torch.where(scores > 0, scores / penalty, scores * penalty))
