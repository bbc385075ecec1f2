"""On several ranks every one makes or reads its own parts of the first weights: the same bits, and never the whole model."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from keural.model import KeuralConfig, KeuralMoECausalLM
from keural.train.initial.parts import Share
from keural.train.initial.weights import initial_model, initial_parts
from keural.train.processes.modes import part_of, sharded_dimension
from keural.train.processes.ranks import Ranks
from keural.train.stage.building import policy_of
from tests.helpers.train_small import small_config, small_job
from tests.train.test_ranks import train_on_ranks

CPU = torch.device("cpu")
SHA = "0" * 64
SETTINGS: dict[str, Any] = {"device": CPU, "compiled": False, "tokenizer_sha": SHA}


@pytest.fixture(params=["random", "read", "read without ChatML"])
def start(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[KeuralConfig, Path | None]:
    """A configuration and what a stage of it starts from."""
    if request.param == "random":
        return small_config(), None
    missing = 2 if "without" in request.param else 0
    config = small_config(vocab_size=small_config().vocab_size - missing, eos_token_id=2)
    torch.manual_seed(5)
    KeuralMoECausalLM(config).save_pretrained(tmp_path)
    return small_config(), tmp_path


@pytest.mark.parametrize("number", [2, 3, 16, pytest.param(100, marks=pytest.mark.slow)])
def test_the_parts_of_all_ranks_are_the_weights_of_one_process(start: tuple[KeuralConfig, Path | None], number: int) -> None:
    config, directory = start
    whole = dict(initial_model(config, directory, 3, **SETTINGS).named_parameters())
    shares = [initial_parts(config, directory, 3, **SETTINGS, share=Share(index, number))[1] for index in range(number)]
    for name, parameter in whole.items():
        dimension = sharded_dimension(parameter.shape, number)
        assert torch.equal(torch.cat([parts[name] for parts in shares], dimension), parameter), name
    assert all(parts.keys() == whole.keys() for parts in shares)


def test_a_network_without_memory_is_left_and_the_generator_is_as_it_was(start: tuple[KeuralConfig, Path | None]) -> None:
    state = torch.random.get_rng_state()
    model, _ = initial_parts(*start, 3, **SETTINGS, share=Share(0, 2))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not model.model.rotary_emb.inv_freq.is_meta
    assert torch.equal(torch.random.get_rng_state(), state)


class Peak(TorchDispatchMode):
    """The most bytes that tensors had at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self._note(tensor.untyped_storage())
        return found

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or size == 0:
            return
        self.known.add(key)
        self.live += size
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def large_config() -> KeuralConfig:
    return small_config(num_hidden_layers=12, hidden_size=64, intermediate_size=96, num_local_experts=8)


@pytest.mark.parametrize("read", [False, True], ids=["random", "read"])
def test_no_rank_ever_holds_the_whole_model(tmp_path: Path, read: bool) -> None:
    """What is there at a time is a rank's parts and one tensor."""
    config = large_config()
    whole = initial_model(config, None, 3, **SETTINGS)
    directory = tmp_path if read else None
    whole.save_pretrained(tmp_path)
    largest = max(4 * parameter.numel() for parameter in whole.parameters())
    total = sum(4 * parameter.numel() for parameter in whole.parameters())
    for index in (0, 7):
        with Peak() as peak:
            _, parts = initial_parts(config, directory, 3, **SETTINGS, share=Share(index, 8))
        share = sum(4 * part.numel() for part in parts.values())
        assert share < 1.1 * total / 8
        assert share < peak.most < share + 2.2 * largest < 0.5 * total


def test_the_measure_sees_a_whole_model() -> None:
    with Peak() as peak:
        model = initial_model(large_config(), None, 3, **SETTINGS)
    assert peak.most > sum(4 * parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("shard_over", [None, 2])
def test_a_sharded_policy_has_the_parts_of_its_rank(tmp_path: Path, shard_over: int | None) -> None:
    job = small_job(tmp_path, "sft", train={"shard_over": shard_over})
    whole = dict(initial_model(job.model_config, job.init, job.seed, **SETTINGS).named_parameters())
    dist.init_process_group("fake", rank=3, world_size=4, store=FakeStore())
    try:
        policy, _, _ = policy_of(job, True, Ranks(3, 4, CPU))
        number = shard_over or 4
        for name, parameter in policy.model.named_parameters():
            expected = whole[name][part_of(whole[name].shape, 3 % number, number)]
            assert torch.equal(parameter.to_local(), expected), name  # type: ignore[operator]
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_frozen_routers_are_known_again_on_another_number_of_ranks(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"train": {"steps": 6, "save_every": 3}, "router": {"freeze": True}}
    train_on_ranks(tmp_path, 2, "next_token", "run", **settings)
    found = train_on_ranks(tmp_path, 1, "next_token", "run", **settings)
    first = initial_model(small_config(), None, 11, **SETTINGS)
    routers = {name: value for name, value in first.named_parameters() if name.endswith("gate.weight")}
    assert routers
    assert all(torch.equal(found["weights"][name], value) for name, value in routers.items())
