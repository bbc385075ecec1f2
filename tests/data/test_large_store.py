"""What a step costs does not depend on how much the store holds."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from keural.data.loading.stream import Stream
from keural.data.tokens.store import TokenStore

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "large_store.py"
LENGTH, ROWS = 1024, 16


@pytest.fixture(scope="module")
def large_store() -> ModuleType:
    spec = importlib.util.spec_from_file_location("large_store", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_random_steps_of_a_store_with_holes_for_tokens_take_little_time_and_memory(tmp_path: Path, large_store: ModuleType) -> None:
    large_store.write_sparse_store(tmp_path / "store", 50_000_000, 70_000, shard_tokens=1 << 22)
    steps = np.random.default_rng(1).integers(0, 9000, 150).tolist()
    found = large_store.measure(tmp_path / "store", LENGTH, ROWS, steps)
    assert found["resident growth"] < 60e6  # the files have 200 MB, and the steps touch half of it
    assert found["median"] < 0.1
    again = large_store.measure(tmp_path / "store", LENGTH, ROWS, steps[-1:])
    assert again["digests"][0] == found["digests"][1]
    assert large_store.same_for_ranks(tmp_path / "store", LENGTH, ROWS, steps[:3])


def test_pages_that_were_forgotten_are_read_again(tmp_path: Path, large_store: ModuleType) -> None:
    large_store.write_sparse_store(tmp_path / "store", 100_000, 200, shard_tokens=1 << 15)
    store = TokenStore.open(tmp_path / "store", verify="size")
    before = [store.sequence(index).tolist() for index in range(0, 200, 7)]
    store.forget_pages()
    assert [store.sequence(index).tolist() for index in range(0, 200, 7)] == before


def test_every_window_of_an_epoch_comes_once_whatever_the_size(tmp_path: Path, large_store: ModuleType) -> None:
    large_store.write_sparse_store(tmp_path / "store", 1_000_000, 3000, shard_tokens=1 << 18)
    stream = Stream(TokenStore.open(tmp_path / "store", verify="size"), "next_token", LENGTH, batch_rows=1)
    instances = np.concatenate([stream._step_instances(step) for step in range(stream.instances_per_epoch)])
    assert np.array_equal(np.sort(instances), np.arange(stream.instances_per_epoch))
