"""Losses and gradients equal TRL's on the same masks and pairs: its own trainers compute theirs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from keural.train.gradients import accumulate_gradients
from keural.train.trainer import Trainer
from tests.helpers.train_small import LENGTH, VOCAB, open_run, random_model, small_job, step_gradients

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
NO_ROUTER = {"balance_coef": 0.0, "z_coef": 0.0}


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"t{number}": number for number in range(VOCAB)}, unk_token="t3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t2", pad_token="t0", unk_token="t3")


def settings(directory: Path) -> dict[str, Any]:
    return {
        "output_dir": str(directory),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "router_aux_loss_coef": 0.0,
        "gradient_checkpointing": False,
    }


def padded(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)


def sequences_of(trainer: Trainer) -> tuple[list[int], list[torch.Tensor], list[torch.Tensor]]:
    """Numbers, tokens and loss masks of the store's sequences in the first batch."""
    ids = trainer.stream.batch(0).sequence_ids
    numbers = sorted(set(ids[ids >= 0].tolist()))
    store = trainer.stream.store
    tokens = [torch.from_numpy(store.sequence(number).astype("int64")) for number in numbers]
    return numbers, tokens, [torch.from_numpy(store.loss_mask(number).astype("int64")) for number in numbers]


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_sft_loss_and_gradients_equal_trls(tmp_path: Path) -> None:
    ours = open_run(small_job(tmp_path, "sft", router=NO_ROUTER)).trainer
    losses, gradients = step_gradients(ours)
    _, tokens, masks = sequences_of(ours)
    model = type(ours.policy.model).from_pretrained(tmp_path / "init", dtype=torch.float32)
    dummy = datasets.Dataset.from_dict({"text": ["t4 t5"]})
    theirs = trl.SFTTrainer(model, trl.SFTConfig(**settings(tmp_path / "trl")), train_dataset=dummy, processing_class=tokenizer())
    labels = padded([torch.where(mask > 0, row, -100) + 100 for row, mask in zip(tokens, masks, strict=True)]) - 100
    real = padded([torch.ones_like(row) for row in tokens])
    loss = theirs.compute_loss(model, {"input_ids": padded(tokens), "attention_mask": real, "labels": labels})
    loss.backward()
    assert losses["loss"].item() == pytest.approx(loss.item(), abs=1e-5)
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4)


def test_dpo_loss_and_gradients_equal_trls_sigmoid_loss(tmp_path: Path) -> None:
    ours = open_run(small_job(tmp_path, "dpo", router=NO_ROUTER, dpo={"beta": 0.3})).trainer
    moved = random_model(seed=8, scale=3.0).state_dict()
    ours.policy.model.load_state_dict(moved)
    losses, gradients = step_gradients(ours)
    model = type(ours.policy.model).from_pretrained(tmp_path / "init", dtype=torch.float32)
    reference = type(model).from_pretrained(tmp_path / "init", dtype=torch.float32)
    dummy = datasets.Dataset.from_dict({"prompt": ["t4 t5"], "chosen": ["t6"], "rejected": ["t7"]})
    config = trl.DPOConfig(**settings(tmp_path / "trl"), beta=0.3, loss_type="sigmoid")
    theirs = trl.DPOTrainer(model, reference, config, train_dataset=dummy, processing_class=tokenizer())
    model.load_state_dict(moved)
    numbers, tokens, masks = sequences_of(ours)
    order = [numbers.index(number) for side in (0, 1) for number in numbers if number % 2 == side]
    loss = theirs.compute_loss(
        model,
        {
            "input_ids": padded([tokens[index] for index in order]),
            "attention_mask": padded([torch.ones_like(tokens[index]) for index in order]),
            "completion_mask": padded([masks[index] for index in order]),
        },
    )
    loss.backward()
    assert losses["loss"].item() == pytest.approx(loss.item(), abs=1e-5)
    assert loss.item() != pytest.approx(0.693, abs=0.01)
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_kto_loss_and_gradients_equal_trls(tmp_path: Path, loss: str) -> None:
    spec = {"beta": 0.3, "loss": loss, "desirable_weight": 1.25, "undesirable_weight": 0.75}
    ours = open_run(small_job(tmp_path, "kto", router=NO_ROUTER, kto=spec)).trainer
    moved = random_model(seed=16, scale=3.0).state_dict()
    ours.policy.model.load_state_dict(moved)
    found = accumulate_gradients(ours, 0)
    gradients = {name: gradient.clone() for name, gradient in gradients_of(ours.policy.model).items()}
    model = type(ours.policy.model).from_pretrained(tmp_path / "init", dtype=torch.float32)
    reference = type(model).from_pretrained(tmp_path / "init", dtype=torch.float32)
    dummy = datasets.Dataset.from_dict({"prompt": ["t4 t5", "t5"], "completion": ["t6", "t7"], "label": [True, False]})
    config = trl.KTOConfig(**settings(tmp_path / "trl"), loss_type=loss, per_device_train_batch_size=2, **weights_of(spec))
    theirs = trl.KTOTrainer(model, reference, config, train_dataset=dummy, processing_class=tokenizer())
    model.load_state_dict(moved)
    store, batch = ours.stream.store, ours.stream.batch(0)
    inputs: dict[str, Any] = {"label": torch.from_numpy(batch.desirable)}
    for prefix, side in (("", 0), ("KL_", 1)):
        sequences = (batch.pair_sequences[0] + side).tolist()
        tokens = [torch.from_numpy(store.sequence(number).astype("int64")) for number in sequences]
        inputs[f"{prefix}input_ids"] = padded(tokens)
        inputs[f"{prefix}attention_mask"] = padded([torch.ones_like(row) for row in tokens])
        inputs[f"{prefix}completion_mask"] = padded(
            [torch.from_numpy(store.loss_mask(number).astype("int64")) for number in sequences]
        )
    value = theirs.compute_loss(model, inputs)
    value.backward()
    assert found.loss == pytest.approx(value.item(), abs=1e-5)
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4)
    said = theirs._metrics["train" if model.training else "eval"]
    (kl,) = said["kl"]
    assert (kl > 0) == (loss == "kto"), "the case is one in which it matters"
    expected = {name: said[f"rewards/{name}"][0] for name in ("chosen", "rejected", "margins")}
    assert found.metrics["kl"] == pytest.approx(kl, abs=1e-4)
    assert found.metrics["reward_desirable"] == pytest.approx(expected["chosen"], abs=1e-4)
    assert found.metrics["reward_undesirable"] == pytest.approx(expected["rejected"], abs=1e-4)
    assert found.metrics["reward_margin"] == pytest.approx(expected["margins"], abs=1e-4)


def weights_of(spec: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in spec.items() if name != "loss"}


def test_rows_are_long_enough_to_hold_several_sequences(tmp_path: Path) -> None:
    """The comparisons above are of packed rows against padded ones."""
    batch = open_run(small_job(tmp_path, "sft")).trainer.stream.batch(0)
    assert int(batch.segment_ids.max(1).min()) >= 2
    assert batch.input_ids.shape[1] == LENGTH
