"""Ranks that are killed at random moments, by the benchmark that does it thirty times (`benchmarks/kills_of_ranks.py`)."""

import random
from pathlib import Path

import pytest

from benchmarks.kills_of_ranks import kill_on_ranks, stop_on_ranks

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("experts", [1, 2])
def test_a_rank_that_is_killed_costs_no_bit_on_as_many_ranks_and_no_loss_on_others(tmp_path: Path, experts: int) -> None:
    """It asserts that itself, of every run that comes to its end."""
    total = kill_on_ranks(tmp_path, 6, random.Random(2), worlds=(1, 2), experts=experts)

    assert (total.spent, total.runs >= 4) == (6, True)
    assert total.in_a_save >= 2


@pytest.mark.parametrize(("world", "experts"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_sigterm_during_a_save_leaves_the_last_step_whole_within_half_a_minute(tmp_path: Path, world: int, experts: int) -> None:
    assert stop_on_ranks(tmp_path, world, experts=experts) < 30
