"""The published seven stages run at any size: the recipe of the card with a small network, few rows and two steps a stage."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from keural.pipeline.run_directory import SUMMARY, Summary

Keural = Callable[..., tuple[int, str, str]]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "sliding_window": 17,
    "max_position_embeddings": 256,
}
STAGES = ("pretrain-1", "pretrain-2", "sft-1", "sft-2", "sft-3", "dpo-1", "dpo-2")


def written(directory: Path) -> None:
    """Rows for the three kinds of stages."""
    sentences = [
        f"Number {number} is followed by {number + 1}, a longer line. 다음 수는 {number + 1}입니다." for number in range(90)
    ]
    rows = {
        "texts": [{"text": " ".join(sentences[k : k + 9])} for k in range(0, 81, 3)],
        "chats": [
            {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
            for asked, said in zip(sentences[:40], sentences[40:80], strict=True)
        ],
        "pairs": [
            {"prompt": asked, "chosen": chosen, "rejected": rejected}
            for asked, chosen, rejected in zip(sentences[:30], sentences[30:60], sentences[60:90], strict=True)
        ],
    }
    for name, lines in rows.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


@pytest.mark.slow
def test_all_seven_stages(tmp_path: Path, published_tokenizer_file: Path, keural: Keural) -> None:
    if not published_tokenizer_file.is_file():
        pytest.skip("the published tokenizer is not there")
    written(tmp_path)
    adapters = {"pretrain": ("text", "texts"), "sft": ("messages", "chats"), "dpo": ("preference", "pairs")}
    overrides = [f"model.{key}={value}" for key, value in SMALL.items()]
    overrides += [f"tokenizer.path={published_tokenizer_file}", "train.compute_dtype=float32", "data.sequence_length=128"]
    overrides += ["train.steps=2", "train.warmup_steps=1", "train.micro_batch_tokens=512", "train.save_every=null"]
    for stage in STAGES:
        adapter, rows = adapters[stage.partition("-")[0]]
        overrides.append(f"{stage}.data.sources=[{{name: rows, adapter: {adapter}, path: {rows}.jsonl}}]")
        overrides.append(f"{stage}.train.batch_pairs=4" if stage.startswith("dpo") else f"{stage}.train.batch_tokens=256")
        overrides.append(f"{stage}.data.min_characters=1") if stage.startswith("pretrain") else None

    code, _, error = keural("run", "keural-14b-published", f"data={tmp_path}", *overrides, "--out", tmp_path / "run")

    assert code == 0, error
    summary = Summary.read(tmp_path / "run" / SUMMARY)
    assert [stage.name for stage in summary.stages] == ["pretrain-1", "pretrain-2", "sft-1", "dpo-1", "sft-2", "sft-3", "dpo-2"]
    assert all(stage.steps == 2 for stage in summary.stages)
    assert summary.stages[4].init_from == "sft-1"  # as the release did


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["h200", "h100", "2xh200", "64xh100"])
def test_the_recipe_of_a_machine_takes_a_step_of_each_stage(tmp_path: Path, machine: str, keural: Keural) -> None:
    """On one process: how many a machine has is another matter. Nothing is compiled, which takes minutes."""
    written(tmp_path)
    prose = "{name: rows, adapter: text, path: texts.jsonl}"
    overrides = [f"model.{key}={value}" for key, value in SMALL.items()]
    overrides += [
        "tokenizer.vocab_size=334",
        f"tokenizer.sources=[{prose}]",
        "data.decontaminate=null",
        "evaluation.bits_per_byte=[]",
    ]
    overrides += ["train.compile=false", "train.steps=2", "train.epochs=null", "train.warmup_steps=1", "data.sequence_length=256"]
    overrides += ["data.heldout_per_mille=0"]
    text = ("text", "texts")
    kinds = {"pretrain-1": text, "pretrain-2": text, "sft": ("messages", "chats"), "dpo": ("preference", "pairs")}
    for stage, (adapter, rows) in kinds.items():
        overrides.append(f"{stage}.data.sources=[{{name: rows, adapter: {adapter}, path: {rows}.jsonl}}]")
        overrides.append(f"{stage}.train.batch_pairs=4" if stage == "dpo" else f"{stage}.train.batch_tokens=512")
        if adapter == "text":
            overrides += [f"{stage}.data.{setting}" for setting in ("min_characters=1", "cleaning=null", "mixing=null")]

    code, said, error = keural(
        "run", f"keural-14b-{machine}", "--dry-run", f"data={tmp_path}", *overrides, "--out", tmp_path / "run"
    )

    assert code == 0, error
    assert all(stage in said for stage in ("pretrain-1", "pretrain-2", "sft", "dpo"))
