"""Which answer is the better one reaches the loss: a set whose labels are swapped teaches the opposite."""

import json
from pathlib import Path
from typing import Any

import torch

from keural.data.prepare import prepare
from keural.data.prepared import Prepared
from keural.recipe import DataSpec, SourceSpec
from keural.tokenizer import KeuralTokenizer
from keural.train.stage.job import StageJob
from keural.train.stage.training import train_stage
from tests.helpers.train_small import LENGTH, random_model, small_config, small_stage

KINDS = ("oak", "elm", "ash", "fir", "yew", "bay")


def rows(numbers: range) -> list[dict[str, Any]]:
    """The better answer ends with `yes`, and stands first or second by turns."""
    found = []
    for number in numbers:
        better, worse = f"{KINDS[number % 6]} yes", f"{KINDS[number // 6 % 6]} no"
        first = number % 3 == 0
        answers = {"a": better, "b": worse} if first else {"a": worse, "b": better}
        found.append({"prompt": f"q{number}", **answers, "winner": "model_a" if first else "model_b"})
    return found


def prepared(directory: Path, tokenizer: KeuralTokenizer, swapped: bool) -> Prepared:
    first, second = ("second", "first") if swapped else ("first", "second")
    options = {"answers": ["a", "b"], "label": "winner", "labels": {"model_a": first, "model_b": second}}
    for name, numbers in (("train", range(48)), ("heldout", range(100, 124))):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(numbers)))
    right = {"model_a": "first", "model_b": "second"}
    source = SourceSpec(name="pairs", adapter="preference", path="train.jsonl", options=options)
    held = SourceSpec(name="held", adapter="preference", path="heldout.jsonl", options=options | {"labels": right})
    spec = DataSpec(sources=[source], heldout_sources=[held], sequence_length=LENGTH)
    return prepare(spec, "dpo", directory, tokenizer, directory / f"prepared-{swapped}", 0)


def test_a_set_with_swapped_labels_trains_a_model_that_prefers_the_wrong_answers(
    tmp_path: Path, tokenizer: KeuralTokenizer
) -> None:
    size = tokenizer.vocab_size
    random_model(seed=3, vocab_size=size).save_pretrained(tmp_path / "init")
    accuracy = {}
    for swapped in (False, True):
        data = prepared(tmp_path, tokenizer, swapped)
        assert (data.table[0].kept, data.table[1].kept) == (48, 24)
        run = tmp_path / f"run-{swapped}"
        run.mkdir()
        train = {"steps": 30, "batch_pairs": 8, "lr": 5e-3, "save_every": 30}
        torch.manual_seed(0)
        job = StageJob(
            stage=small_stage("dpo", train=train),
            seed=1,
            model_config=small_config(vocab_size=size),
            init=tmp_path / "init",
            train_store=data.train,
            heldout_store=data.heldout,
            tokenizer_sha=tokenizer.sha256,
            run_dir=run,
            fingerprint="f" * 64,
        )
        accuracy[swapped] = train_stage(job).heldout["reward_accuracy"]
    assert accuracy[False] > 0.8
    assert accuracy[True] < 0.2
