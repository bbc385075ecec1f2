"""A kept plan is the one that was made: any damage is recognised, and processes that make it at once leave it whole."""

import multiprocessing
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest

from keural.data.loading.packing_plan import RowPlan, kept_plan

LENGTHS = np.array([9, 12, 5, 16, 7, 7, 3, 15])
DATA = "d" * 64


def make() -> RowPlan:
    return RowPlan.pack(np.arange(len(LENGTHS)), LENGTHS, 16)


def never() -> RowPlan:
    raise AssertionError("the plan is there")


def same(one: RowPlan, other: RowPlan) -> bool:
    return np.array_equal(one.sequences, other.sequences) and np.array_equal(one.ends, other.ends)


def test_a_plan_is_made_once(tmp_path: Path) -> None:
    made = kept_plan(tmp_path, "store", 16, DATA, make)
    assert same(kept_plan(tmp_path, "store", 16, DATA, never), made)
    for capacity, data in ((17, DATA), (16, "e" * 64)):
        with pytest.raises(AssertionError, match="the plan is there"):
            kept_plan(tmp_path, "store", capacity, data, never)


def test_one_flipped_bit_anywhere_is_recognised_and_the_plan_made_again(tmp_path: Path) -> None:
    """In the header, the lengths, the sequences and the digest; the file is then the first one again, byte for byte."""
    expected = kept_plan(tmp_path, "store", 16, DATA, make)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    made = []

    def make_again() -> RowPlan:
        made.append(None)
        return make()

    places = range(0, len(whole), 3)
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        assert same(kept_plan(tmp_path, "store", 16, DATA, make_again), expected)
        assert path.read_bytes() == whole
    assert len(made) == len(places)


def make_at_once(directory: Path, barrier: Barrier) -> None:
    """Finds no plan, and writes one when every other process has found none, too."""

    def make_together() -> RowPlan:
        barrier.wait(240)
        return make()

    assert same(kept_plan(directory, "store", 16, DATA, make_together), make())


def test_processes_that_make_a_plan_at_once_leave_a_good_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [context.Process(target=make_at_once, args=(tmp_path, barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0]
    assert same(kept_plan(tmp_path, "store", 16, DATA, never), make())
    assert len(list(tmp_path.iterdir())) == 1, "no temporary file is left"
