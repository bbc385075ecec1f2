"""Choosing the next token: the distribution of transformers' processors, for small and large vocabularies, one number a token."""

import statistics
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

from keural.errors import UserError
from keural.serve.engines import sampling as sampling_room
from keural.serve.engines.sampling import Sampler, choose, choose_by_sorting, choose_where_possible, have_best, quiet
from keural.serve.engines.sampling_params import SamplingParams
from tests.helpers.examples import examples
from tests.helpers.next_token import next_token_distribution, token_at

VOCABULARY = 131_074
WAYS = {"row by row": quiet(choose_where_possible), "by sorting": choose_by_sorting}


class At(Sampler):
    """A sampler whose random number is given."""

    def __init__(self, number: float, sampling: SamplingParams, prompt_ids: list[int], size: int) -> None:
        super().__init__(sampling, prompt_ids, size)
        self.number = number

    def uniform(self) -> float:
        return self.number


def of_transformers(ids: Tensor, logits: Tensor, sampling: SamplingParams) -> Tensor:
    """Probabilities `[V]` after transformers' processors for the ids `[T]` so far; in float64, for their sums of a large vocabulary
    in float32 decide over the last tokens differently on other processors.
    """
    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
            TemperatureLogitsWarper(sampling.temperature),
            TopPLogitsWarper(sampling.top_p),
        ]
    )
    return processors(ids[None], logits[None].double())[0].softmax(-1)


def random_case(seed: int, size: int, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, ids so far, and the mask of these ids."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, generator=generator) * spread
    ids = torch.randint(0, size, (12,), generator=generator)
    seen = torch.zeros(size, dtype=torch.bool)
    seen[ids] = True
    return logits, ids, seen


def shares(logits: Tensor, ids: Tensor, sampling: SamplingParams, way: str, draws: int = 1000) -> Tensor:
    """How often each token is chosen when the numbers are spread evenly, in the middle of each part."""
    samplers = [At((place + 0.5) / draws, sampling, ids.tolist(), len(logits)) for place in range(draws)]
    tokens = WAYS[way](logits.expand(draws, -1), samplers)
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / draws


@pytest.mark.parametrize("way", WAYS)
@examples(15)
@given(
    st.integers(0, 10_000), st.floats(0.1, 3.0), st.sampled_from([0.0, 0.05, 0.5, 0.9, 0.99, 1.0]), st.sampled_from([0.8, 1.0, 1.1])
)
def test_tokens_come_as_often_as_transformers_processors_say(
    way: str, seed: int, temperature: float, top_p: float, penalty: float
) -> None:
    logits, ids, seen = random_case(seed, 50, 3.0)
    sampling = SamplingParams(temperature, top_p, penalty)
    expected = next_token_distribution(logits, seen, sampling)

    if top_p > 0:  # theirs refuse it
        torch.testing.assert_close(expected, of_transformers(ids, logits, sampling), rtol=1e-4, atol=1e-7)
    assert float((shares(logits, ids, sampling, way) - expected).abs().max()) < 1.01 / 1000


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spread", [0.0, 0.02, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.999, 1.0])
def test_of_a_large_vocabulary_the_number_takes_the_token_at_its_place(way: str, spread: float, top_p: float) -> None:
    logits, ids, seen = random_case(1, VOCABULARY, spread)
    sampling = SamplingParams(0.7, top_p, 1.1)
    expected = next_token_distribution(logits, seen, sampling)
    numbers = [0.0, 0.25, 0.5, 0.789, 0.999, 1 - 1e-6]

    samplers = [At(number, sampling, ids.tolist(), VOCABULARY) for number in numbers]
    found = WAYS[way](logits.expand(len(numbers), -1), samplers)

    for number, token in zip(numbers, found, strict=True):
        wanted = token_at(expected, number)
        # where thousands are as good as equally probable, the rounding of a sum moves a place to a neighbour
        assert token == wanted or float(expected[token] / expected[wanted]) == pytest.approx(1, abs=2e-3)
        assert expected[token] > 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("levels", [1, 2, 3, 400, 100_000])
def test_the_nucleus_ends_where_that_of_a_full_sort_in_float64_does_first_tokens_first(way: str, levels: int, top_p: float) -> None:
    logits = torch.randint(0, levels, (20_000,), generator=torch.Generator().manual_seed(levels)) * (8.0 / levels)
    exact = np.exp(logits.double().numpy())
    order = np.argsort(-exact, kind="stable")
    before = np.concatenate([[0.0], np.cumsum(exact[order] / exact.sum())[:-1]])
    last = int(order[before < top_p - 1e-9][-1])

    end = At(1 - 2**-53, SamplingParams(1.0, top_p, 1.0), [], 20_000)

    assert WAYS[way](logits[None], [end]) == [last]


@pytest.mark.parametrize("way", WAYS)
def test_top_p_zero_and_temperature_zero_take_the_most_probable_token(way: str) -> None:
    logits = torch.tensor([[0.0, 2.0, 1.9, 2.0]]).expand(3, -1)
    rows = [SamplingParams(top_p=0.0), SamplingParams(temperature=0), SamplingParams(temperature=0, repetition_penalty=2.0)]

    assert WAYS[way](logits, [Sampler(row, [1] if row is rows[2] else [], 4) for row in rows]) == [1, 1, 3]


def test_a_temperature_that_is_all_but_zero_is_no_nan() -> None:
    assert choose(torch.tensor([[1e4, -1e4, 0.0]]), [Sampler(SamplingParams(temperature=2e-5), [], 3)]) == [0]


@pytest.mark.parametrize("way", WAYS)
def test_rows_do_not_touch_each_other(way: str) -> None:
    cases = [random_case(seed, 300, 3.0) for seed in range(8)]
    settings = [SamplingParams(0.3 + 0.2 * place, 0.5 + 0.06 * place, 1 + 0.05 * place, seed=place) for place in range(8)]

    def samplers() -> list[Sampler]:
        return [Sampler(row, case[1].tolist(), 300) for row, case in zip(settings, cases, strict=True)]

    logits = torch.stack([case[0] for case in cases])
    together, alone = samplers(), samplers()
    for _ in range(20):
        apart = [WAYS[way](row[None], [sampler])[0] for row, sampler in zip(logits, alone, strict=True)]
        assert WAYS[way](logits, together) == apart


def test_both_ways_choose_the_same_tokens() -> None:
    logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(3)) * 3

    def samplers() -> list[Sampler]:
        return [
            Sampler(SamplingParams(0.2 + 0.02 * seed, 0.9, (0.5, 2.0)[seed % 2], seed=seed), range(seed, 5000, 9), 5000)
            for seed in range(64)
        ]

    assert choose(logits, samplers()) == choose_by_sorting(logits, samplers())


@pytest.mark.parametrize("top_p", [0.0, 0.5, 0.9, 0.999])
def test_the_short_way_for_a_few_likely_tokens_takes_the_same_ones(monkeypatch: pytest.MonkeyPatch, top_p: float) -> None:
    sampling = SamplingParams(0.7, top_p, 1.1)
    chosen: list[list[int]] = []
    shortened: list[bool] = []
    of_few = sampling_room._of_few
    monkeypatch.setattr(sampling_room, "_of_few", lambda *given: (found := of_few(*given), shortened.append(found is not None))[0])
    for few in (sampling_room.FEW, 0):
        monkeypatch.setattr(sampling_room, "FEW", few)
        chosen.append([])
        for seed, spread in enumerate([1.0, 2.0, 3.0, 5.0, 9.0] * 3):
            logits, ids, _ = random_case(seed, VOCABULARY, spread)
            logits = (logits * 4).round() / 4 if seed >= 10 else logits  # many of the same probability
            numbers = (0.0, 0.3, 0.77, 1 - 1e-12)
            chosen[-1] += choose(logits.expand(4, -1), [At(number, sampling, ids.tolist(), VOCABULARY) for number in numbers])
    assert chosen[0] == chosen[1]
    half = len(shortened) // 2
    assert any(shortened[:half])
    assert not any(shortened[half:])


def test_whatever_makes_weights_of_exponents_the_tokens_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[list[int]] = []
    for power in sampling_room.POWERS:
        monkeypatch.setattr(sampling_room, "_quickest_power", lambda: power)  # noqa: B023
        chosen.append([])
        for seed, (spread, temperature) in enumerate([(1.0, 0.3), (2.0, 0.7), (3.0, 0.7), (9.0, 1.5)]):
            logits, ids, _ = random_case(seed, VOCABULARY, spread)
            samplers = [
                At(number, SamplingParams(temperature, 0.9, 1.1), ids.tolist(), VOCABULARY)
                for number in (0.0, 0.3, 0.77, 1 - 1e-12)
            ]
            chosen[-1] += choose(logits.expand(4, -1), samplers)
    assert chosen[1:] == chosen[:1] * (len(chosen) - 1)


def test_numbers_at_the_border_between_two_tokens_are_decided_by_exact_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = SamplingParams(0.7, 0.9, 1.0)
    logits, _, _ = random_case(4, VOCABULARY, 3.0)
    borders = (
        next_token_distribution(logits, torch.zeros(VOCABULARY, dtype=torch.bool), sampling).sort(descending=True)[0].cumsum(0)
    )
    numbers = [float(borders[rank]) + miss for rank in (0, 3, 20, 90) for miss in (-3e-7, 3e-7)]

    def chosen() -> list[int]:
        return choose(logits.expand(len(numbers), -1), [At(number, sampling, [], VOCABULARY) for number in numbers])

    found = chosen()
    monkeypatch.setattr(sampling_room, "FEW", 0)

    assert found == chosen()
    assert all(before != after for before, after in zip(found[::2], found[1::2], strict=True))


def test_scores_whose_weights_are_equal_in_float32_have_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether rough sums or exact ones decide is another matter on another processor, or with more threads."""
    size = 40
    logits = torch.full((1000,), -9.0)
    logits[:size] = 0.3 + torch.arange(size) * 3e-8  # the later the likelier
    logits[500] = 0.9
    assert len(logits.unique()) == 2 + size > 10 + len((logits - 0.9).exp().unique())
    sampling = SamplingParams(1.0, 0.99, 1.0)
    numbers = [place / 500 for place in range(500)]

    def chosen() -> list[int]:
        return choose(logits.expand(len(numbers), -1), [At(number, sampling, [], 1000) for number in numbers])

    found = chosen()
    monkeypatch.setattr(sampling_room, "FEW", 0)

    assert chosen() == found
    assert list(dict.fromkeys(found))[: size + 1] == [500, *reversed(range(size))]


def test_places_fall_by_score_and_equal_ones_rise() -> None:
    some = [0.0, -0.0, 1e-45, -1e-45, float("-inf"), -3.0, 2.5, 2.5, 0.0, -0.0, 1.0000001, 1.0, float("-inf"), 3e38, -3e38]
    scores = np.array(some * 3, dtype=np.float32)

    assert sampling_room._falling(scores).tolist() == sorted(range(len(scores)), key=lambda place: -scores[place])


@pytest.mark.parametrize("shift", [-90.0, -20.0, 0.0, 18.0, 25.0, 90.0, 1e5])
def test_what_is_added_to_all_logits_changes_no_choice(shift: float) -> None:
    logits = (random_case(6, 5000, 3.0)[0] * 64).round() / 64  # so that the sums are exact
    sampling = SamplingParams(0.7, 0.9, 1.0)
    numbers = [0.0, 0.2, 0.5, 0.8, 0.999]

    def chosen(row: Tensor) -> list[int]:
        return choose(row.expand(len(numbers), -1), [At(number, sampling, [], 5000) for number in numbers])

    assert chosen(logits + shift) == chosen(logits)


def test_a_token_of_the_answer_is_penalized_from_then_on() -> None:
    sampler = Sampler(SamplingParams(temperature=0, repetition_penalty=2.0), [], 40)
    logits = torch.arange(40.0)[None]

    assert [choose(logits, [sampler])[0] for _ in range(19)] == list(range(39, 20, -1))
    assert sorted(sampler.seen) == list(range(21, 40))


def test_a_seed_gives_the_same_numbers_and_none_gives_others() -> None:
    def numbers(seed: int | None) -> list[float]:
        sampler = Sampler(SamplingParams(seed=seed), [], 4)
        return [sampler.uniform() for _ in range(3)]

    assert numbers(7) == numbers(7) == [0.32383276483316237, 0.15084917392450192, 0.6509344730398537]
    assert numbers(8) != numbers(7)
    assert numbers(None) != numbers(None)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_have_no_token_and_the_others_theirs(way: str, wrong: float) -> None:
    logits = torch.zeros(2, 9)
    logits[1, 4] = wrong
    samplers = [Sampler(SamplingParams(temperature=0), [], 9) for _ in range(2)]

    assert WAYS[way](logits, samplers) == [0, None]
    with pytest.raises(UserError, match="logits are not finite"):
        choose(logits, samplers)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("penalty", "token"), [(0.01, None), (100.0, 1)])
def test_a_penalty_beyond_what_numbers_hold_is_no_warning(way: str, penalty: float, token: int | None) -> None:
    logits = torch.tensor([[1e37, 9e36, -1e37]])

    assert WAYS[way](logits, [Sampler(SamplingParams(1e-3, 0.9, penalty), [0, 2], 3)]) == [token]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_logit_of_minus_infinity_never_comes(way: str, temperature: float) -> None:
    logits = torch.full((1, 5000), float("-inf"))
    logits[0, [7, 4000]] = torch.tensor([1.0, 1.5])
    samplers = [At(place / 50, SamplingParams(temperature, 1.0, 1.3), [7, 9], 5000) for place in range(50)]

    assert set(WAYS[way](logits.expand(50, -1), samplers)) == ({7, 4000} if temperature else {4000})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wrong", [None, float("nan")])
def test_logits_stay_as_they_are(way: str, wrong: float | None) -> None:
    logits, ids, _ = random_case(2, 50, 3.0)
    if wrong is not None:
        logits[5] = wrong
    before = logits.clone()

    found = WAYS[way](logits[None], [Sampler(SamplingParams(repetition_penalty=2.0), ids.tolist(), 50)])

    assert (found == [None]) == (wrong is not None)

    assert torch.equal(logits.nan_to_num(), before.nan_to_num())


def test_of_an_array_the_same_tokens_come_as_of_a_tensor() -> None:
    logits = torch.randn(6, 70_000, generator=torch.Generator().manual_seed(3)) * 3
    logits[4, 9] = float("-inf")

    def samplers() -> list[Sampler]:
        return [Sampler(SamplingParams(0.2 * seed, 0.9, 1.1, seed=seed), [seed, 7], 70_000) for seed in range(6)]

    assert choose(logits.numpy(), samplers()) == choose(logits, samplers())


def test_a_row_has_a_best_token_if_the_largest_logit_is_a_number() -> None:
    logits = torch.zeros(5, 9)
    logits[1, 2] = float("-inf")
    logits[2] = float("-inf")
    logits[3, 2] = float("inf")
    logits[4, 2] = float("nan")

    assert have_best(logits.numpy()) == have_best(logits) == [True, True, False, False, False]


@pytest.mark.parametrize(
    "values", [{"temperature": -1.0}, {"top_p": 1.5}, {"repetition_penalty": 0.0}, {"max_new_tokens": 0}], ids=str
)
def test_impossible_settings_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(UserError, match="impossible sampling settings"):
        SamplingParams(**values)  # type: ignore[arg-type]


def test_a_token_costs_less_than_a_full_sort_of_the_vocabulary() -> None:
    for spread in (1.0, 4.0):
        logits, ids, _ = random_case(5, VOCABULARY, spread)
        sampler = Sampler(SamplingParams(seed=0), ids.tolist(), VOCABULARY)
        ours = median_of(lambda: choose(logits[None], [sampler]))  # noqa: B023
        theirs = median_of(lambda: logits.softmax(-1).sort(descending=True))  # noqa: B023
        assert ours < theirs


def median_of(function: object, rounds: int = 9) -> float:
    """Processor seconds of this process."""
    taken = []
    for _ in range(rounds):
        start = time.process_time()
        function()  # type: ignore[operator]
        taken.append(time.process_time() - start)
    return statistics.median(taken)
