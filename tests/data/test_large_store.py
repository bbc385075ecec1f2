"""What a step costs does not depend on how much the store holds."""

import time
from pathlib import Path

import numpy as np

from benchmarks.large_store import measure, same_for_ranks, write_sparse_store
from keural.data.loading.stream import Stream
from keural.data.tokens.store import TokenStore

LENGTH, ROWS = 1024, 16
STEPS = np.random.default_rng(1).integers(0, 9000, 150).tolist()


def processor_seconds(stream: Stream, step: int) -> float:
    started = time.process_time()
    stream.batch(step)
    return time.process_time() - started


def test_random_steps_of_a_store_with_holes_for_tokens_take_little_memory(tmp_path: Path) -> None:
    write_sparse_store(tmp_path / "store", 50_000_000, 70_000, shard_tokens=1 << 22)
    found = measure(tmp_path / "store", LENGTH, ROWS, STEPS)
    assert found["resident growth"] < 60e6  # the files have 200 MB, and the steps touch half of it
    again = measure(tmp_path / "store", LENGTH, ROWS, STEPS[-1:])
    assert again["digests"][0] == found["digests"][1]
    assert same_for_ranks(tmp_path / "store", LENGTH, ROWS, STEPS[:3])


def test_a_step_of_a_hundred_times_larger_store_takes_no_longer(tmp_path: Path) -> None:
    """The quickest of many steps, taken in turns and in time of the processor: whatever else the machine does, it does to both."""
    streams = []
    for name, times in (("small", 1), ("large", 100)):
        write_sparse_store(tmp_path / name, times * 10_000_000, times * 700, shard_tokens=1 << 26)
        streams.append(Stream(TokenStore.open(tmp_path / name, verify="size"), "next_token", LENGTH, batch_rows=ROWS))
    seconds = [[processor_seconds(stream, step) for stream in streams] for step in STEPS]
    small, large = np.min(seconds, axis=0)
    assert large < 3 * small  # making the epoch's whole order anew would take 20 times as long


def test_pages_that_were_forgotten_are_read_again(tmp_path: Path) -> None:
    write_sparse_store(tmp_path / "store", 100_000, 200, shard_tokens=1 << 15)
    store = TokenStore.open(tmp_path / "store", verify="size")
    before = [store.sequence(index).tolist() for index in range(0, 200, 7)]
    store.forget_pages()
    assert [store.sequence(index).tolist() for index in range(0, 200, 7)] == before


def test_every_window_of_an_epoch_comes_once_whatever_the_size(tmp_path: Path) -> None:
    write_sparse_store(tmp_path / "store", 1_000_000, 3000, shard_tokens=1 << 18)
    stream = Stream(TokenStore.open(tmp_path / "store", verify="size"), "next_token", LENGTH, batch_rows=1)
    instances = np.concatenate([stream._order.step(step) for step in range(stream.instances_per_epoch)])
    assert np.array_equal(np.sort(instances), np.arange(stream.instances_per_epoch))
