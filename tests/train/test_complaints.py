"""The complaints that users of training frameworks file again and again, each as a test that would have caught it here.

Each of the thirteen kinds has the test that is named after it; where the subject has a file of its own, that goes deeper.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from keural.data.loading.row_layout import RowShape
from keural.data.loading.stream import Stream
from keural.data.tokens.store import StoreWriter, TokenStore
from keural.errors import UserError
from keural.files import atomic_directory
from keural.train.checks.probes import check_references
from keural.train.gradients import accumulate_gradients
from keural.train.micro_batches import micro_batches
from keural.train.stage.training import train_stage
from tests.helpers.train_small import (
    END,
    LENGTH,
    SHA,
    VOCAB,
    losses_of,
    metrics_of,
    open_run,
    small_job,
    step_gradients,
    weights_of,
    write_store,
)

GATE = "model.layers.0.mlp.gate.weight"
ROUTER = {"balance_coef": 0.5, "z_coef": 0.1}
NO_ROUTER = {"balance_coef": 0.0, "z_coef": 0.0}
TRAINED_ON = ("next_token", "sft", "dpo")


def difference(directory: Path, objective: str, train: dict[str, Any]) -> torch.Tensor:
    """What the router losses add to a gate's gradient."""
    gates = []
    for run, router in (("with", ROUTER), ("without", NO_ROUTER)):
        job = small_job(directory, objective, run=f"{run}-{len(list(directory.iterdir()))}", router=router, train=train)
        gates.append(step_gradients(open_run(job).trainer)[1][GATE])
    return gates[0] - gates[1]


@pytest.mark.parametrize("objective", TRAINED_ON)
def test_1_router_losses_are_lost_in_alignment(tmp_path: Path, objective: str) -> None:
    """`test_step.test_router_losses_add_exactly_their_own_gradient` says how much they add."""
    assert difference(tmp_path, objective, {}).abs().max() > 1e-4


@pytest.mark.parametrize("objective", TRAINED_ON)
def test_2_router_losses_are_zero_because_the_configuration_says_no_router_logits(tmp_path: Path, objective: str) -> None:
    trainer = open_run(small_job(tmp_path, objective)).trainer
    assert trainer.policy.model.config.output_router_logits is False, "as exported models say"
    found = accumulate_gradients(trainer, 0)
    assert float(found.router.counts.sum()) == 2 * 2 * found.tokens, "two experts per token in each of two layers"
    train_stage(small_job(tmp_path, objective, run="other", train={"steps": 1, "warmup_steps": 0}))
    line = metrics_of(small_job(tmp_path, objective, run="other"))[0]
    assert line["balance_loss"] >= 1
    assert line["z_loss"] > 0


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_3_padding_is_counted(tmp_path: Path, objective: str) -> None:
    """The same records in rows twice as long, of which more is padding, give the same loss, gradients and router statistics."""
    found, padding = [], []
    store = TokenStore.open(write_store(tmp_path / "few", objective, 2))
    for length in (LENGTH, 2 * LENGTH):
        trainer = open_run(small_job(tmp_path, objective, run=str(length), router=ROUTER)).trainer
        # rows of pairs have the length that fits them; rounded up to a multiple they have padding
        size = {"batch_pairs": 2, "pair_rows": RowShape(4 * length, 2 * length)} if objective == "dpo" else {"batch_rows": 1}
        stream = Stream(store, objective, length, **size)  # type: ignore[arg-type]
        references = (lambda sequences: torch.zeros(sequences.shape)) if objective == "dpo" else None
        found.append(step_gradients(dataclasses.replace(trainer, stream=stream, references=references)))
        padding.append(int((stream.batch(0).segment_ids == 0).sum()))
    assert padding[1] > padding[0] + LENGTH / 2
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("objective", TRAINED_ON)
def test_4_router_losses_grow_with_gradient_accumulation(tmp_path: Path, objective: str) -> None:
    """Ranks: `test_ranks`."""
    whole = difference(tmp_path, objective, {})
    torch.testing.assert_close(difference(tmp_path, objective, {"micro_batch_tokens": 2 * LENGTH}), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_5_a_fused_loss_ignores_the_mask(tmp_path: Path, recompute: str) -> None:
    """The loss is the mean over the mask's tokens of dense log-softmax, by either head."""
    trainer = open_run(small_job(tmp_path, "sft", train={"recompute": recompute})).trainer
    (micro,) = micro_batches(trainer.stream.batch(0), None, torch.device("cpu"))
    trained = micro.labels >= 0
    assert 0.2 < float(trained.float().mean()) < 0.8
    with torch.no_grad():
        logits = trainer.policy.model(input_ids=micro.input_ids, position_ids=micro.position_ids, use_cache=False).logits
    dense = -logits.log_softmax(-1).gather(-1, micro.labels.clamp(min=0)[..., None]).squeeze(-1)
    assert accumulate_gradients(trainer, 0).loss == pytest.approx(dense[trained].mean().item(), abs=1e-5)


def test_6_a_mask_that_is_zero_everywhere_trains(tmp_path: Path) -> None:
    """`test_checks` has the others of its kind."""
    with atomic_directory(tmp_path / "zero") as path, StoreWriter(path, SHA, VOCAB, "conversations") as writer:
        for _ in range(10):
            writer.add([5, 6, 7, END], [0, 0, 0, 0])
    with pytest.raises(UserError, match=r"zero: 100.00% of the records have nothing that is trained"):
        train_stage(dataclasses.replace(small_job(tmp_path, "sft"), train_store=tmp_path / "zero"))


@pytest.mark.parametrize("objective", TRAINED_ON)
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_7_packed_documents_see_each_other(tmp_path: Path, objective: str, recompute: str) -> None:
    """Another document before it changes no log-probability of a document, bit for bit."""
    trainer = open_run(small_job(tmp_path, objective, train={"recompute": recompute})).trainer
    (micro,) = micro_batches(trainer.stream.batch(0), None, torch.device("cpu"))
    segments = torch.from_numpy(trainer.stream.batch(0).segment_ids)
    others = torch.where(segments == 1, (micro.input_ids + 7) % VOCAB, micro.input_ids)
    assert not torch.equal(others, micro.input_ids)
    with torch.no_grad():
        before, after = (trainer.policy(dataclasses.replace(micro, input_ids=ids)).logprobs for ids in (micro.input_ids, others))
    torch.testing.assert_close(after[segments > 1], before[segments > 1], atol=1e-6, rtol=0)


def test_8_reference_values_of_another_model_are_used(tmp_path: Path) -> None:
    """Whatever the cache says of itself, the first step is compared."""
    job = small_job(tmp_path, "dpo", train={"steps": 1, "warmup_steps": 0})
    train_stage(job)
    assert losses_of(job)[0] == pytest.approx(math.log(2), abs=1e-7)

    def other(sequences: np.ndarray) -> torch.Tensor:
        return torch.full(sequences.shape, -30.0)

    trainer = dataclasses.replace(open_run(small_job(tmp_path, "dpo", run="fresh")).trainer, references=other)
    with pytest.raises(UserError, match="of another model"):
        check_references(trainer)


class Largest(TorchDispatchMode):
    """The largest tensor with a dimension of the vocabulary that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, torch.Tensor) and value.ndim >= 2 and value.shape[-1] == VOCAB:
                self.rows = max(self.rows, value.numel() // VOCAB)
        return made


@pytest.mark.parametrize("objective", TRAINED_ON)
def test_9_all_logits_exist_at_once(tmp_path: Path, objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for eight positions' logits no operation of a step makes those of more (32 is the head's own height)."""
    monkeypatch.setattr("keural.train.losses.LOGITS_PER_CHUNK", 8 * VOCAB)
    trainer = open_run(small_job(tmp_path, objective, train={"batch_pairs": 16 if objective == "dpo" else None})).trainer
    assert trainer.stream.batch(0).num_labels > 40
    with Largest() as largest:
        accumulate_gradients(trainer, 0)
    assert 8 <= largest.rows <= 32


def test_10_experts_without_tokens_stop_the_training(tmp_path: Path) -> None:
    """All tokens go to two experts of four: the others have gradients, of zeros, so that no rank waits for them, and train on."""
    trainer = open_run(small_job(tmp_path, "sft", router=ROUTER)).trainer
    with torch.no_grad():
        for layer in trainer.policy.model.model.layers:
            layer.mlp.gate.weight.zero_()  # a tie, which the same two experts always win
    losses, gradients = step_gradients(trainer)
    idle = losses["counts"][0] == 0
    assert idle.sum() == 2
    experts = {name: gradient for name, gradient in gradients.items() if ".experts." in name}
    assert experts
    for name, gradient in experts.items():
        assert (gradient[idle] == 0).all(), name
        assert gradient[~idle].abs().max() > 0, name


def test_12_a_checkpoint_lacks_weights(tmp_path: Path) -> None:
    """Every parameter is there whole, and read back as it was. Of several ranks: `test_checkpoint`."""
    from safetensors import safe_open

    job = small_job(tmp_path, "dpo", train={"steps": 2, "warmup_steps": 0, "save_every": 2})
    weights = weights_of(train_stage(job))
    found: dict[str, torch.Tensor] = {}
    for file in (job.run_dir / "checkpoints" / "step-00000002").glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys() if name.startswith("model.")}  # noqa: SIM118
    assert found.keys() == {f"model.{name}" for name in weights}
    for name, value in weights.items():
        assert torch.equal(found[f"model.{name}"], value), name


@pytest.mark.parametrize("objective", TRAINED_ON)
def test_13_resuming_skips_or_repeats_data(tmp_path: Path, objective: str) -> None:
    """The losses after a stop are those of a run that was not stopped. At random moments, by kill: `test_resume`."""
    train = {"steps": 4, "save_every": 2, "warmup_steps": 0, "lr": 1e-3, "min_lr": 1e-3}
    whole = small_job(tmp_path, objective, run="whole", train=train)
    train_stage(whole)
    stopped = small_job(tmp_path, objective, run="stopped", train=train | {"steps": 2})
    train_stage(stopped)
    train_stage(dataclasses.replace(stopped, stage=whole.stage))
    assert losses_of(stopped) == losses_of(whole)
