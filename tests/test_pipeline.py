"""The pipeline on a tiny recipe: stages in order, skipped when finished, made again when changed, refused in one line."""

import fcntl
import json
import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from keural.cli.app import main
from keural.data.loading.stream import Stream
from keural.data.tokens.store import StoreWriter, TokenStore
from keural.files import read_json
from keural.pretrained.stored_model import load_model
from tests.helpers.published_writer import pack_documents, write_shard
from tests.helpers.shapes import OF_A_RECIPE

WORDS = ["하늘", "바다", "나무", "구름", "바람", "sea", "sky", "tree", "cloud", "오늘", "내일", "going", "봅니다", "읽어요", "sees"]
Keural = Callable[..., tuple[int, str, str]]


def sentences(count: int, seed: int) -> Iterator[str]:
    generator = random.Random(seed)
    for _ in range(count):
        yield " ".join(generator.choices(WORDS, k=generator.randint(3, 9))) + "."


def write_data(directory: Path) -> None:
    directory.mkdir()
    (directory / "prose.jsonl").write_text(
        "".join(json.dumps({"text": " ".join(sentences(4, seed))}) + "\n" for seed in range(300))
    )
    chats, pairs = [], []
    for question, answer, other in zip(sentences(150, 1), sentences(150, 2), sentences(150, 3), strict=True):
        chats.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
        pairs.append({"prompt": question, "chosen": answer, "rejected": other})
    (directory / "chats.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chats))
    (directory / "pairs.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in pairs))


def write_recipe(directory: Path, data: Path) -> None:
    directory.mkdir()
    prose = [{"name": "prose", "adapter": "text", "path": "prose.jsonl", "language": "ko"}]
    chats = [{"name": "chats", "adapter": "messages", "path": "chats.jsonl"}]
    pairs = [{"name": "pairs", "adapter": "preference", "path": "pairs.jsonl"}]
    train = {"steps": 6, "lr": 1e-3, "warmup_steps": 2, "save_every": 2}
    files = {
        "recipe": {
            "name": "tiny",
            "data": str(data),
            "model": OF_A_RECIPE,
            "tokenizer": {"vocab_size": 360, "sources": prose},
            "stages": ["base", "chat", "align"],
            "evaluation": {
                "bits_per_byte": [
                    {"name": "prose", "stage": "base", "max_bytes": 5000},
                    {"name": "prose, overlapping", "stage": "base", "sources": ["prose"], "max_bytes": 5000, "overlap": 24},
                ]
            },
            "chat": {"samples": ["하늘 바다?"], "max_new_tokens": 8},
        },
        "base": {
            "name": "base",
            "objective": "next_token",
            "data": {"sources": prose, "sequence_length": 32, "heldout_per_mille": 50},
            "train": train | {"batch_tokens": 128},
        },
        "chat": {
            "name": "chat",
            "objective": "sft",
            "init_from": "base",
            "data": {"sources": chats, "sequence_length": 64, "heldout_per_mille": 50},
            "train": train | {"batch_tokens": 256},
        },
        "align": {
            "name": "align",
            "objective": "dpo",
            "init_from": "chat",
            "data": {"sources": pairs, "sequence_length": 64, "heldout_per_mille": 50},
            "train": train | {"batch_pairs": 4},
        },
    }
    for name, content in files.items():
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(content, allow_unicode=True))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `recipe`, `data` and the finished run `run`."""
    root = tmp_path_factory.mktemp("pipeline")
    write_data(root / "data")
    write_recipe(root / "recipe", root / "data")
    patch = pytest.MonkeyPatch()
    patch.setattr(sys, "argv", ["keural", "run", str(root / "recipe"), "--out", str(root / "run")])
    with patch.context():
        try:
            main()
        except SystemExit as stop:
            assert not stop.code, stop.code  # noqa: PT017 - the command may end by exiting with success
    patch.undo()
    return root


@pytest.fixture
def workplace(finished: Path, tmp_path: Path) -> Path:
    """A private copy of the finished run, with the recipe pointing to the same data."""
    shutil.copytree(finished, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_model(directory).state_dict()


def test_a_run_leaves_summary_report_and_a_final_model(finished: Path) -> None:
    run = finished / "run"
    summary = read_json(run / "summary.json")
    assert [stage["name"] for stage in summary["stages"]] == ["base", "chat", "align"]
    for stage in summary["stages"]:
        assert {"name", "seconds", "tokens", "loss_first", "loss_last"} <= stage.keys()
        assert stage["steps"] == 6
    assert (run / "final").resolve() == (run / "align" / "model").resolve()
    assert summary["evaluation"]["bits_per_byte"][0]["models"].keys() == {"untrained", "base", "align"}
    plain, overlapping = summary["evaluation"]["bits_per_byte"]
    assert overlapping["bytes"] == plain["bytes"]
    assert overlapping["models"]["align"] != plain["models"]["align"]
    assert summary["samples"][0]["language"] == "ko"
    report = (run / "report.html").read_text()
    assert "<svg" in report
    assert "http://" not in report.replace("http://www.w3.org", "")


def test_metrics_have_one_line_per_step(finished: Path) -> None:
    for stage in ("base", "chat", "align"):
        lines = [json.loads(line) for line in (finished / "run" / stage / "metrics.jsonl").read_text().splitlines()]
        steps = [line["step"] for line in lines if "loss" in line]
        assert steps == sorted(set(steps))
        assert len(steps) == 6
        load = torch.tensor(next(line["expert_load"] for line in lines if "expert_load" in line))
        assert load.shape == (2, 4)
        torch.testing.assert_close(load.sum(-1), torch.ones(2), atol=1e-4, rtol=0)


def test_running_again_skips_everything(workplace: Path, keural: Keural) -> None:
    before = {path: path.stat().st_mtime_ns for path in (workplace / "run").rglob("*.safetensors")}
    code, _, err = keural("run", workplace / "recipe", "--out", workplace / "run")
    assert code == 0, err
    assert before == {path: path.stat().st_mtime_ns for path in (workplace / "run").rglob("*.safetensors")}


def test_a_changed_stage_is_made_again_and_the_old_one_kept(workplace: Path, keural: Keural) -> None:
    code, _, err = keural("run", workplace / "recipe", "align.train.lr=5e-4", "--out", workplace / "run")
    assert code == 0, err
    assert (workplace / "run" / "align.old-1" / "done.json").is_file()
    assert not (workplace / "run" / "chat.old-1").exists()
    old, new = weights(workplace / "run" / "align.old-1"), weights(workplace / "run" / "align")
    assert any(not torch.equal(old[name], new[name]) for name in old)


def test_the_same_recipe_gives_the_same_weights_bit_for_bit(finished: Path, tmp_path: Path, keural: Keural) -> None:
    code, _, err = keural("run", finished / "recipe", "--until", "chat", "--out", tmp_path / "again")
    assert code == 0, err
    old, new = weights(finished / "run" / "chat"), weights(tmp_path / "again" / "chat")
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_one_stage_alone_needs_the_one_before(finished: Path, tmp_path: Path, keural: Keural) -> None:
    code, _, err = keural("train", finished / "recipe" / "chat.yaml", "--out", tmp_path / "new")
    assert code == 2
    assert "base" in err
    assert "not finished" in err


def test_running_a_part_of_a_finished_recipe_leaves_it_finished(workplace: Path, keural: Keural) -> None:
    run = workplace / "run"
    for arguments in (("train", workplace / "recipe" / "base.yaml"), ("run", workplace / "recipe", "--until", "base")):
        code, _, err = keural(*arguments, "--out", run)
        assert code == 0, err
        assert (run / "final").readlink() == Path("align/model")
        summary = read_json(run / "summary.json")
        assert [stage["name"] for stage in summary["stages"]] == ["base", "chat", "align"]
        assert summary["evaluation"]["bits_per_byte"]


def test_a_stage_made_again_alone_leaves_its_successors_out(workplace: Path, keural: Keural) -> None:
    code, _, err = keural("train", workplace / "recipe" / "chat.yaml", "chat.train.lr=5e-4", "--out", workplace / "run")
    assert code == 0, err
    assert (workplace / "run" / "final").readlink() == Path("chat/model")
    summary = read_json(workplace / "run" / "summary.json")
    assert [stage["name"] for stage in summary["stages"]] == ["base", "chat"]
    assert summary["evaluation"] == {}


def test_the_last_stage_alone_beside_a_side_branch(workplace: Path, keural: Keural) -> None:
    recipe = workplace / "recipe"
    side = (recipe / "chat.yaml").read_text().replace("name: chat\n", "name: side\n")
    (recipe / "side.yaml").write_text(side)
    (recipe / "recipe.yaml").write_text((recipe / "recipe.yaml").read_text().replace("- chat\n", "- chat\n- side\n"))
    code, _, err = keural("run", recipe, "--until", "side", "--out", workplace / "run")
    assert code == 0, err
    shutil.rmtree(workplace / "run" / "align")
    code, _, err = keural("train", recipe / "align.yaml", "--out", workplace / "run")
    assert code == 0, err
    assert len(read_json(workplace / "run" / "summary.json")["stages"]) == 4


def test_other_text_trains_another_tokenizer(workplace: Path, keural: Keural) -> None:
    prose = workplace / "data" / "prose.jsonl"
    prose.write_text(prose.read_text().replace("going", "zebra"))
    before = (workplace / "run" / "tokenizer" / "tokenizer.model").read_bytes()
    code, _, err = keural("tokenizer", "train", workplace / "recipe", f"data={workplace / 'data'}", "--out", workplace / "run")
    assert code == 0, err
    assert before != (workplace / "run" / "tokenizer" / "tokenizer.model").read_bytes()
    assert before == (workplace / "run" / "tokenizer.old-1" / "tokenizer.model").read_bytes()


def test_generate_and_chat_take_the_final_directory(
    finished: Path, keural: Keural, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    final = finished / "run" / "final"
    code, out, err = keural("generate", final, "--prompt", "하늘?", "--max-new-tokens", "4", "--temperature", "0")
    assert code == 0, err
    assert out
    (tmp_path / "typed").write_text("바다?\n/exit\n")
    with (tmp_path / "typed").open() as typed:
        monkeypatch.setattr("sys.stdin", typed)
        code, out, err = keural("chat", final, "--max-new-tokens", "4")
    assert code == 0, err


def test_show_prints_the_batch_of_a_step(finished: Path, keural: Keural) -> None:
    code, out, err = keural("data", "show", finished / "recipe" / "chat.yaml", "--step", "3", "--out", finished / "run")
    assert code == 0, err
    assert "<|im_start|>" in out


def test_the_resolved_recipe_is_printed_with_its_size(finished: Path, keural: Keural) -> None:
    code, out, _ = keural("recipe", finished / "recipe")
    assert code == 0
    assert yaml.safe_load(out)["recipe"]["model"]["rope_theta"] == 500_000.0
    assert "parameters" in out


def one_line(err: str) -> str:
    lines = [line for line in err.splitlines() if line.startswith("keural: error: ")]
    assert len(lines) == 1, err
    return lines[0]


def assert_each_stage_is_refused(err: str, file: str) -> None:
    """The data of every stage is damaged, and all of it is said at once, in a line for each."""
    lines = [line for line in err.splitlines() if line.startswith("keural: error: ")]
    assert len(lines) == len(set(lines)) == 3, err
    assert all(file in line for line in lines), err


class TestRefusals:
    """Exit code 2, one line, nothing half-written."""

    @pytest.fixture
    def place(self, tmp_path: Path) -> Path:
        write_data(tmp_path / "data")
        write_recipe(tmp_path / "recipe", tmp_path / "data")
        return tmp_path

    def refused(self, keural: Keural, place: Path, *overrides: str) -> str:
        code, _, err = keural("run", place / "recipe", *overrides, "--out", place / "run")
        assert code == 2, err
        assert not list(place.glob("run/*/stage.json"))
        assert not list(place.rglob("*.tmp"))
        return one_line(err)

    def test_unknown_key(self, place: Path, keural: Keural) -> None:
        assert "did you mean 'train.lr'" in self.refused(keural, place, "train.lrr=1")
        assert not (place / "run").exists()

    @pytest.mark.parametrize("override", ["train.lr=2024-13-45", "seed=" + "9" * 5000, "dpo.betta=1", "model.hidden_size=33"])
    def test_impossible_override(self, override: str, place: Path, keural: Keural) -> None:
        self.refused(keural, place, override)
        assert not (place / "run").exists()

    def test_an_override_of_every_stage_reaches_data(self, place: Path, keural: Keural) -> None:
        assert "train.batch_tokens 128" in self.refused(keural, place, "data.sequence_length=48")

    @pytest.mark.parametrize("content", ["name: 2024-13-45\n", "[" * 5000, None])
    def test_unreadable_stage_file(self, content: str | None, place: Path, keural: Keural) -> None:
        path = place / "recipe" / "chat.yaml"
        path.unlink()
        path.mkdir() if content is None else path.write_text(content)
        assert str(path) in self.refused(keural, place)

    def test_a_measure_of_no_stage(self, place: Path, keural: Keural) -> None:
        path = place / "recipe" / "recipe.yaml"
        path.write_text(path.read_text().replace("stage: base", "stage: bose"))
        assert "did you mean 'base'" in self.refused(keural, place)

    def test_a_measure_without_room_for_a_document(self, place: Path, keural: Keural) -> None:
        path = place / "recipe" / "recipe.yaml"
        path.write_text(path.read_text().replace("max_bytes: 5000", "max_bytes: 1"))
        assert "max_bytes 1" in self.refused(keural, place)

    def test_a_stage_with_a_reserved_name(self, place: Path, keural: Keural) -> None:
        (place / "recipe" / "align.yaml").rename(place / "recipe" / "final.yaml")
        path = place / "recipe" / "recipe.yaml"
        path.write_text(path.read_text().replace("- align", "- final"))
        assert "'final'" in self.refused(keural, place)

    def test_a_run_directory_that_cannot_be(self, place: Path, keural: Keural) -> None:
        (place / "file").write_text("x")
        for out in (place / "file", place / "file" / "run"):
            code, _, err = keural("run", place / "recipe", "--out", out)
            assert code == 2
            assert str(out) in one_line(err)

    def test_a_second_run_in_the_same_directory(self, workplace: Path, keural: Keural) -> None:
        with (workplace / "run" / ".lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            code, _, err = keural("run", workplace / "recipe", "--out", workplace / "run")
        assert code == 2
        assert "another run" in one_line(err)

    @pytest.mark.parametrize("marker", ["base/done.json", "tokenizer/done.json", "evaluation.json", "align/stage.json"])
    @pytest.mark.parametrize("content", ["[]", "{}", "", '{"fingerprint": 3}'])
    def test_damaged_marker(self, marker: str, content: str, workplace: Path, keural: Keural) -> None:
        (workplace / "run" / marker).write_text(content)
        (workplace / "run" / "align" / "done.json").unlink()
        code, _, err = keural("run", workplace / "recipe", "--out", workplace / "run")
        assert code == 2
        assert marker in one_line(err)

    def test_damaged_tokenizer(self, workplace: Path, keural: Keural) -> None:
        path = workplace / "run" / "tokenizer" / "tokenizer.model"
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 1
        path.write_bytes(data)
        code, _, err = keural("run", workplace / "recipe", "--out", workplace / "run")
        assert code == 2
        assert "tokenizer.model" in one_line(err)
        assert not list((workplace / "run").glob("*.old-*"))

    def test_missing_data_directory(self, place: Path, keural: Keural) -> None:
        assert "no such directory" in self.refused(keural, place, f"data={place / 'nowhere'}")

    def test_missing_source(self, place: Path, keural: Keural) -> None:
        (place / "data" / "pairs.jsonl").unlink()
        assert "pairs.jsonl" in self.refused(keural, place)
        assert not (place / "run").exists()

    def test_empty_file(self, place: Path, keural: Keural) -> None:
        (place / "data" / "chats.jsonl").write_text("")
        assert "chats.jsonl" in self.refused(keural, place)

    def test_unknown_adapter(self, place: Path, keural: Keural) -> None:
        path = place / "recipe" / "chat.yaml"
        path.write_text(path.read_text().replace("adapter: messages", "adapter: mesages"))
        assert "messages" in self.refused(keural, place)

    def test_conversations_without_assistant(self, place: Path, keural: Keural) -> None:
        row = json.dumps({"messages": [{"role": "user", "content": "hello"}]})
        (place / "data" / "chats.jsonl").write_text(f"{row}\n" * 3)
        message = self.refused(keural, place)
        assert "chats" in message
        assert "assistant" in message

    def test_chosen_equal_to_rejected(self, place: Path, keural: Keural) -> None:
        row = json.dumps({"prompt": "a", "chosen": "same", "rejected": "same"})
        (place / "data" / "pairs.jsonl").write_text(f"{row}\n")
        assert "chosen_equals_rejected" in self.refused(keural, place)

    def test_prompt_longer_than_the_length(self, place: Path, keural: Keural) -> None:
        row = json.dumps({"prompt": "하늘 바다 " * 200, "chosen": "a", "rejected": "b"})
        (place / "data" / "pairs.jsonl").write_text(f"{row}\n")
        assert "prompt_too_long" in self.refused(keural, place)

    def test_corrupted_checkpoint(self, workplace: Path, keural: Keural) -> None:
        (workplace / "run" / "align" / "done.json").unlink()
        victim = max((workplace / "run" / "align" / "checkpoints").rglob("*.safetensors"), key=lambda path: path.stat().st_size)
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
        code, _, err = keural("run", workplace / "recipe", "--out", workplace / "run")
        assert code == 2
        assert victim.name in one_line(err)

    def test_truncated_store(self, workplace: Path, keural: Keural) -> None:
        (workplace / "run" / "align" / "done.json").unlink()
        for victim in (workplace / "run" / "data").rglob("*.ds"):
            victim.write_bytes(victim.read_bytes()[:-4])
        code, _, err = keural("run", workplace / "recipe", "--out", workplace / "run")
        assert code == 2
        assert_each_stage_is_refused(err, ".ds")

    def test_not_a_model_directory(self, tmp_path: Path, keural: Keural) -> None:
        for command in (["generate", tmp_path, "--prompt", "hi"], ["chat", tmp_path / "nowhere"]):
            code, _, err = keural(*command)
            assert code == 2
            assert str(tmp_path) in one_line(err)


def test_a_stage_does_not_start_from_damaged_weights(workplace: Path, keural: Keural) -> None:
    (workplace / "run" / "align" / "done.json").unlink()
    victim = workplace / "run" / "chat" / "model" / "model.safetensors"
    data = bytearray(victim.read_bytes())
    data[-5] ^= 1
    victim.write_bytes(data)
    code, _, err = keural("train", workplace / "recipe" / "align.yaml", "--out", workplace / "run")
    assert code == 2
    assert "model.safetensors" in one_line(err)


def test_a_store_whose_counts_are_changed_is_refused(workplace: Path, keural: Keural) -> None:
    (workplace / "run" / "align" / "done.json").unlink()
    for manifest in (workplace / "run" / "data").rglob("manifest.json"):
        manifest.write_text(
            re.sub(r'"num_tokens": (\d+)', lambda match: f'"num_tokens": {int(match[1]) + 1}', manifest.read_text())
        )
    code, _, err = keural("run", workplace / "recipe", "--out", workplace / "run")
    assert code == 2
    assert_each_stage_is_refused(err, "manifest.json")


def shards_of(directory: Path, workplace: Path) -> dict[str, Any]:
    """Published shards with words of the recipe's own vocabulary."""
    length = 64
    for number in range(2):
        words = [random.Random(9 * number + row).choices(range(260, 360), k=length - 2) for row in range(20)]
        write_shard(directory, number, pack_documents(words, length), length)
    return {"shards": str(directory), "sequence_length": length}


def prepared_of(workplace: Path, source: str) -> Path:
    """The prepared data of a stage of the recipe."""
    found = (workplace / "run" / "data").glob("*/prepared.json")
    return next(path.parent for path in found if read_json(path)["table"][0]["source"] == source)


def store_of(directory: Path, workplace: Path) -> dict[str, Any]:
    """The prepared documents."""
    return {"store": str(prepared_of(workplace, "prose")), "sequence_length": 32}


def chats_of(directory: Path, workplace: Path) -> dict[str, Any]:
    """The prepared conversations."""
    return {"store": str(prepared_of(workplace, "chats")), "sequence_length": 64}


def mixed_stores_of(directory: Path, workplace: Path) -> dict[str, Any]:
    """Two stores of conversations by weight, the small one repeated."""
    prepared = prepared_of(workplace, "chats")
    stores = [{"name": name, "path": str(prepared / name), "weight": 1.0} for name in ("train", "heldout")]
    return {"stores": stores, "mixing": {"max_repeat": 3.0}, "sequence_length": 64}


def mixture_of(directory: Path, workplace: Path) -> dict[str, Any]:
    """Two sources by weight, one of them repeated."""
    rows = [json.dumps({"text": " ".join(sentences(4, seed))}) for seed in range(900, 950)]
    directory.mkdir()
    (directory / "few.jsonl").write_text("\n".join(rows))
    prose = {"name": "prose", "adapter": "text", "path": "prose.jsonl", "language": "ko", "weight": 1.0}
    few = {"name": "few", "adapter": "text", "path": str(directory / "few.jsonl"), "language": "en", "weight": 1.0}
    return {"sources": [prose, few], "mixing": {"max_repeat": 3.0}, "sequence_length": 32}


def test_a_ready_store_whose_masks_are_empty_is_refused_with_one_line(workplace: Path, keural: Keural) -> None:
    """The prepared conversations, once more with nothing trained: the run ends with exit code 2, and no step is done."""
    prepared = TokenStore.open(prepared_of(workplace, "chats") / "train")
    with StoreWriter(workplace / "zero", prepared.tokenizer_sha, prepared.vocab_size, "conversations") as writer:
        for number in range(prepared.num_sequences):
            writer.add(prepared.sequence(number), 0 * prepared.loss_mask(number))
    stage = workplace / "recipe" / "base.yaml"
    data = {"store": str(workplace / "zero"), "sequence_length": 64}
    spec = yaml.safe_load(stage.read_text()) | {"objective": "sft", "data": data}
    spec["train"]["batch_tokens"] = 256
    stage.write_text(yaml.safe_dump(spec))
    recipe = yaml.safe_load((workplace / "recipe" / "recipe.yaml").read_text()) | {"evaluation": {}, "stages": ["base"]}
    (workplace / "recipe" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, _, err = keural("run", workplace / "recipe", "--out", workplace / "new")
    assert code == 2
    line = one_line(err)
    assert f"{workplace / 'zero'}: 100.00% of the records have nothing that is trained" in line
    assert "checks.empty" in line
    assert not (workplace / "new" / "base" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("objective", "data"),
    [
        ("next_token", shards_of),
        ("next_token", store_of),
        ("next_token", mixture_of),
        ("sft", chats_of),
        ("sft", mixed_stores_of),
    ],
)
def test_a_stage_on_ready_or_mixed_data_resumes_to_the_same_weights(
    objective: str,
    data: Callable[[Path, Path], dict[str, Any]],
    workplace: Path,
    keural: Keural,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = data(workplace / "ready", workplace)
    stage = workplace / "recipe" / "base.yaml"
    spec = yaml.safe_load(stage.read_text()) | {"objective": objective, "data": settings}
    spec["train"]["batch_tokens"] = 4 * settings["sequence_length"]
    stage.write_text(yaml.safe_dump(spec))
    recipe = yaml.safe_load((workplace / "recipe" / "recipe.yaml").read_text()) | {"evaluation": {}, "stages": ["base"]}
    (workplace / "recipe" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, _, err = keural("run", workplace / "recipe", "--out", workplace / "whole")
    assert code == 0, err
    batch = Stream.batch

    def interrupted(self: Stream, step: int, *share: int) -> Any:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, step, *share)

    with monkeypatch.context() as patch:
        patch.setattr(Stream, "batch", interrupted)
        assert keural("run", workplace / "recipe", "--out", workplace / "twice")[0] == 128 + signal.SIGINT
    assert keural("run", workplace / "recipe", "--out", workplace / "twice")[0] == 0
    first, second = (load_model(workplace / name / "base" / "model").state_dict() for name in ("whole", "twice"))
    assert all(torch.equal(first[name], second[name]) for name in first)
