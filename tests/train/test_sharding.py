"""How weights are divided: nearly equal parts on any number of processes, by the real code on a group that does not communicate."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from keural.model import KeuralConfig, KeuralMoECausalLM
from keural.train.network.policy import Policy
from keural.train.processes.modes import largest_part, sharded_dimension
from keural.train.processes.parallel import shard
from keural.train.processes.ranks import Ranks
from tests.helpers.train_small import losses_of, small_job, small_stage, train_stage
from tests.train.test_ranks import train_on_ranks

LAYERS = 24
PARAMETERS = 14_832_054_272


@contextmanager
def group(rank: int, world: int) -> Iterator[Ranks]:
    """One rank of a group whose collectives do nothing."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield Ranks(rank, world, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def sharded(rank: int, world: int, layers: int) -> dict[str, int]:
    """Elements of every tensor that a rank holds of a model of the published widths, which is never allocated."""
    with group(rank, world) as ranks:
        with torch.device("meta"):
            model = KeuralMoECausalLM(KeuralConfig(num_hidden_layers=layers))
        shard(Policy(model, torch.bfloat16), model, small_stage().train, ranks)
        return {name: local(parameter) for name, parameter in model.named_parameters()}


def local(parameter: nn.Parameter) -> int:
    found: int = parameter.to_local().numel()  # type: ignore[operator]
    return found


def held(rank: int, world: int) -> int:
    """Parameters of the published model that a rank holds: all layers are alike."""
    return sum(number * (LAYERS if ".layers." in name else 1) for name, number in sharded(rank, world, 1).items())


@pytest.mark.parametrize("rank", [0, 7, 8, 63])
def test_a_rank_of_64_holds_less_than_a_quarter_of_a_billion_parameters(rank: int) -> None:
    assert 0.95 * PARAMETERS / 64 < held(rank, 64) <= 0.25e9


@pytest.mark.slow
@pytest.mark.parametrize("world", [8, 11, 16, 64, 512, 1024])
def test_every_rank_holds_an_equal_part(world: int) -> None:
    most = max(held(rank, world) for rank in range(min(world, 64)))

    assert PARAMETERS / world <= most < 1.07 * PARAMETERS / world


@pytest.mark.slow
def test_all_layers_are_divided_alike() -> None:
    assert sum(sharded(0, 64, LAYERS).values()) == held(0, 64)


def test_a_tensor_is_divided_along_its_rows_unless_parts_would_be_far_from_equal() -> None:
    assert sharded_dimension((131_074, 4096), 64) == 0  # one row in two thousand is nothing
    assert sharded_dimension((8, 11_264, 4096), 8) == 0
    assert sharded_dimension((8, 11_264, 4096), 64) == 1
    assert sharded_dimension((8, 4096, 5632), 11) == 2
    assert sharded_dimension((8, 11_264, 4096), 12) == 0  # nothing can be divided by 12
    assert sharded_dimension((7,), 3) == 0
    assert largest_part((8, 11_264, 4096), 64) == 8 * 176 * 4096
    assert largest_part((8, 11_264, 4096), 12) == 11_264 * 4096


@pytest.mark.slow
def test_experts_divided_along_other_dimensions_train_the_same_model_and_go_on_with_one_process(tmp_path: Path) -> None:
    """Of 4 experts 3 ranks hold equal parts along the widths, 48 and 24."""
    assert [sharded_dimension(shape, 3) for shape in ((4, 48, 32), (4, 32, 24))] == [1, 2]
    settings = {"train": {"steps": 8, "save_every": 4, "keep_checkpoints": 2}}
    one, three = (small_job(tmp_path, run=run, **settings) for run in ("one", "three"))
    train_stage(one)
    expected = losses_of(one)

    train_on_ranks(tmp_path, 3, "next_token", "three", **settings)

    assert losses_of(three) == pytest.approx(expected, abs=1e-5)
    last = three.run_dir / "checkpoints" / "step-00000008"
    last.rename(last.with_name("moved-away"))
    train_stage(three)
    assert losses_of(three) == pytest.approx(expected, abs=1e-5)
