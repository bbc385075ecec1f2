"""Choosing the next token: the distribution of transformers' processors, for small and large vocabularies."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

from keural.errors import UserError
from keural.serve.engines.sampling import choose, next_token_distribution, penalize
from keural.serve.engines.sampling_params import SamplingParams


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
    return processors(ids[None], logits[None].double())[0].softmax(-1).float()


def random_case(seed: int, size: int, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, ids so far, and the mask of these ids."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, generator=generator) * spread
    ids = torch.randint(0, size, (12,), generator=generator)
    seen = torch.zeros(size, dtype=torch.bool)
    seen[ids] = True
    return logits, ids, seen


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.floats(0.1, 3.0), st.sampled_from([0.05, 0.5, 0.9, 0.99]), st.sampled_from([0.8, 1.0, 1.1, 2.0]))
def test_distribution_equals_transformers_processors(seed: int, temperature: float, top_p: float, penalty: float) -> None:
    logits, ids, seen = random_case(seed, 50, 3.0)
    sampling = SamplingParams(temperature, top_p, penalty)

    torch.testing.assert_close(next_token_distribution(logits, seen, sampling), of_transformers(ids, logits, sampling))


@pytest.mark.parametrize("spread", [0.02, 1.0, 2.0, 4.0, 8.0])
@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.999, 1.0])
def test_distribution_is_the_same_where_the_vocabulary_is_too_large_to_sort(spread: float, top_p: float) -> None:
    logits, ids, seen = random_case(1, 131_074, spread)
    sampling = SamplingParams(0.7, top_p, 1.1)

    ours, theirs = next_token_distribution(logits, seen, sampling), of_transformers(ids, logits, sampling)

    # of tokens that are equally probable theirs may keep others
    torch.testing.assert_close(ours.sort().values, theirs.sort().values, rtol=1e-5, atol=0)
    assert int(((ours > 0) != (theirs > 0)).sum()) <= 2


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("levels", [1, 2, 3, 400, 100_000])
def test_the_nucleus_is_that_of_a_full_sort_in_float64_first_tokens_first(levels: int, top_p: float) -> None:
    logits = torch.randint(0, levels, (20_000,), generator=torch.Generator().manual_seed(levels)) * (8.0 / levels)
    kept = next_token_distribution(logits, torch.zeros(20_000, dtype=torch.bool), SamplingParams(1.0, top_p, 1.0)) > 0

    exact = np.exp(logits.double().numpy())
    order = np.argsort(-exact, kind="stable")
    before = np.concatenate([[0.0], np.cumsum(exact[order] / exact.sum())[:-1]])
    wanted = np.zeros(20_000, dtype=bool)
    wanted[order[before < top_p - 1e-9]] = True
    assert np.array_equal(kept.numpy(), wanted)


def test_tokens_of_equal_probability_do_not_hang_it() -> None:
    kept = next_token_distribution(torch.zeros(10_000), torch.zeros(10_000, dtype=torch.bool), SamplingParams(1.0, 0.5, 1.0))

    assert int((kept > 0).sum()) == pytest.approx(5_000, abs=2)
    assert float(kept.sum()) == pytest.approx(1.0)


def test_top_p_zero_leaves_the_most_probable_token() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0])

    assert next_token_distribution(logits, torch.zeros(3, dtype=torch.bool), SamplingParams(top_p=0.0)).tolist() == [0, 1, 0]


def test_logits_stay_as_they_are() -> None:
    logits, _, seen = random_case(2, 50, 3.0)
    before = logits.clone()

    choose(logits, seen, SamplingParams(), torch.Generator().manual_seed(0))
    penalize(logits, seen, 2.0)

    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "values", [{"temperature": -1.0}, {"top_p": 1.5}, {"repetition_penalty": 0.0}, {"max_new_tokens": 0}], ids=str
)
def test_impossible_settings_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(UserError, match="impossible sampling settings"):
        SamplingParams(**values)  # type: ignore[arg-type]
