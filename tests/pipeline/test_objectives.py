"""A model's record says what its stages were trained for, and exports end texts accordingly."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from keural.convert.export import ExportOptions, export
from keural.pretrained.lineage import is_base, trained_on_tools
from keural.pretrained.stored_model import read_lineage
from keural.tokenizer.model_file import EOS_ID

OBJECTIVES = {"steady": ["next_token"], "chat": ["next_token", "sft"], "align": ["next_token", "sft", "dpo"]}


@pytest.mark.parametrize("stage", OBJECTIVES)
def test_a_stage_lists_the_objectives_of_its_chain(finished: Path, tmp_path: Path, stage: str) -> None:
    lineage = read_lineage(finished / "run" / stage)

    assert lineage["objectives"] == OBJECTIVES[stage]
    assert is_base(lineage) == (stage == "steady")
    out = export(finished / "run" / stage, tmp_path / "out", "hf", ExportOptions())
    end = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert (end == EOS_ID) == (stage == "steady")


@pytest.mark.parametrize(("start", "before"), [("chat/model", ["next_token", "sft"]), ("steady/model", ["next_token"])])
def test_what_is_known_of_the_start_comes_along(
    finished: Path, tmp_path: Path, keural: Callable[..., tuple[int, str, str]], start: str, before: list[str]
) -> None:
    """Documents after chats leave a model that chats."""
    setting = f"steady.init_from={finished / 'run' / start}"
    code, _, err = keural("run", finished / "recipe", "--until", "steady", setting, "--out", tmp_path / "run")

    assert code == 0, err
    assert read_lineage(tmp_path / "run")["objectives"] == [*before, "next_token"]


def test_random_weights_are_known_to_know_nothing(
    finished: Path, tmp_path: Path, keural: Callable[..., tuple[int, str, str]]
) -> None:
    assert keural("init", finished / "recipe", tmp_path / "m", "--tokenizer", finished / "run" / "tokenizer")[0] == 0
    assert not is_base(read_lineage(tmp_path / "m"))

    setting = f"steady.init_from={tmp_path / 'm'}"
    assert keural("run", finished / "recipe", "--until", "steady", setting, "--out", tmp_path / "run")[0] == 0

    assert read_lineage(tmp_path / "run")["objectives"] == ["next_token"]


def test_weights_of_which_nothing_is_known_make_no_base_model(
    finished: Path, tmp_path: Path, keural: Callable[..., tuple[int, str, str]]
) -> None:
    export(finished / "run" / "chat", tmp_path / "pt", "pt", ExportOptions())
    (tmp_path / "pt" / "keural.json").unlink()
    assert keural("import", tmp_path / "pt", tmp_path / "m")[0] == 0
    assert read_lineage(tmp_path / "m")["objectives"] == ["unknown"]

    setting = f"steady.init_from={tmp_path / 'm'}"
    assert keural("run", finished / "recipe", "--until", "steady", setting, "--out", tmp_path / "run")[0] == 0

    lineage = read_lineage(tmp_path / "run")
    assert lineage["objectives"] == ["unknown", "next_token"]
    assert not is_base(lineage)


def test_a_model_that_was_trained_on_calls_of_tools_says_so(
    finished: Path, tmp_path: Path, keural: Callable[..., tuple[int, str, str]]
) -> None:
    """The count goes on from stage to stage; a result of a tool is no call, nor is a call that is not trained."""
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    asked, result, said = {"role": "user", "content": "?"}, {"role": "tool", "content": "5"}, {"role": "assistant", "content": "!"}
    rows = [
        *([{**asked, "content": f"{number}"}, call | {"train": True}, result, said] for number in range(3)),
        [asked, call | {"train": False}, result, said],
        [{**asked, "content": "hm"}, said],
    ]
    chats = tmp_path / "calls.jsonl"
    chats.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    source = json.dumps({"name": "calls", "adapter": "messages", "path": str(chats)})
    settings = [f"chat.data.sources=[{source}]", "chat.data.sequence_length=256", "model.max_position_embeddings=256"]
    settings += ["chat.data.heldout_per_mille=0"]

    assert read_lineage(finished / "run" / "align")["tool_conversations"] == 0
    code, _, err = keural("run", finished / "recipe", "--until", "chat", *settings, "--out", tmp_path / "run")
    assert code == 0, err
    lineage = read_lineage(tmp_path / "run" / "chat")
    assert lineage["tool_conversations"] == 3
    assert trained_on_tools(lineage)
    out = export(tmp_path / "run" / "chat", tmp_path / "pt", "pt", ExportOptions())
    assert keural("import", out, tmp_path / "back")[0] == 0
    assert read_lineage(tmp_path / "back")["tool_conversations"] == 3


def test_a_last_stage_alone_is_measured_on_what_is_there(
    finished: Path, tmp_path: Path, keural: Callable[..., tuple[int, str, str]]
) -> None:
    """The recipe's held-out text is of a stage that was not trained here, and has no data here."""
    start = f"align.init_from={finished / 'run' / 'chat' / 'model'}"
    code, out, err = keural("train", finished / "recipe" / "align.yaml", start, "--out", tmp_path / "run")

    assert code == 0, err
    assert "'prose' left out" in out + err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["samples"]
    assert "bits_per_byte" not in summary["evaluation"]
