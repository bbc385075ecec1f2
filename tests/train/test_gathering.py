"""What a stage ends with is written from all ranks, and no rank ever holds all of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from keural.errors import UserError
from keural.pretrained.weights import Weights, state_dict_weights
from keural.train.initial.weights import initial_model
from keural.train.processes.gathering import with_gathered
from keural.train.processes.ranks import Ranks, session
from keural.train.stage.building import policy_of
from tests.helpers.sharded_steps import on_ranks
from tests.helpers.train_small import random_model, small_job

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


def test_the_weights_are_those_of_the_model_under_their_stored_names() -> None:
    model = random_model()
    expected = state_dict_weights({name: value for name, value in model.state_dict().items() if name != "lm_head.weight"})
    found = with_gathered(model, ALONE, lambda weights: {name: tensor.clone() for name, tensor in weights})
    assert list(found) == list(expected.infos)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected)


def save_some(weights: Weights, out: str, number: int) -> int:
    """Read the first `number` tensors, and fail if there are more."""
    names = list(weights.infos)[:number]
    torch.save({name: weights.read(name).clone() for name in names}, out)
    if number < len(weights.infos):
        raise UserError("the disk is full")
    return len(names)


def gather(directory: str, out: str) -> None:
    """On several ranks: a writer that fails early, and one that writes all; no more than one parameter is whole at a time."""
    whole: list[int] = []
    original: Any = DTensor.full_tensor

    def counted(self: Any) -> torch.Tensor:
        value: torch.Tensor = original(self)
        whole.append(value.numel())
        return value

    with session() as ranks:
        policy, _, _ = policy_of(small_job(Path(directory)), True, ranks)
        DTensor.full_tensor = counted  # type: ignore[method-assign]
        with pytest.raises(UserError, match="the disk is full"):
            with_gathered(policy.model, ranks, lambda weights: save_some(weights, out, 3))
        assert whole == [parameter.numel() for parameter in policy.model.parameters()]
        number = with_gathered(policy.model, ranks, lambda weights: save_some(weights, out, 10**6))
        assert number > len(list(policy.model.parameters()))
        assert len(whole) == 2 * len(list(policy.model.parameters()))


@pytest.mark.slow
def test_two_ranks_give_one_tensor_after_another_and_go_on_when_the_writer_fails(tmp_path: Path) -> None:
    small_job(tmp_path)
    on_ranks(2, gather, str(tmp_path), str(tmp_path / "weights.pt"))
    job = small_job(tmp_path)
    model = initial_model(job.model_config, None, job.seed, CPU, compiled=False, tokenizer_sha=job.tokenizer_sha)
    expected = state_dict_weights(dict(model.named_parameters()))
    found = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected)
