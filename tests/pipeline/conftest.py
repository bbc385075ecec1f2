"""A tiny recipe of three stages, and its run in the states that a machine may leave it in."""

import json
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from keural.cli.app import main
from keural.files import CHECKSUM, fingerprint, read_object, write_json
from tests.helpers.shapes import OF_A_RECIPE

WORDS = ["하늘", "바다", "나무", "구름", "바람", "sea", "sky", "tree", "cloud", "오늘", "내일", "going", "봅니다", "읽어요", "sees"]


@dataclass(frozen=True)
class Place:
    """A recipe, its data and its run, and the command that is run on them."""

    root: Path
    command: Callable[..., tuple[int, str, str]]

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.root / "run"

    def __call__(self, *arguments: object, out: Path | None = None) -> tuple[int, str, str]:
        """`keural run` with these arguments: exit code, standard output, standard error."""
        return self.command("run", self.root / "recipe", *arguments, "--out", out or self.run)

    def again(self, *arguments: object) -> str:
        """Run it again, to the end; what it said."""
        code, out, err = self(*arguments)
        assert code == 0, err
        return out

    def refused(self, *arguments: object, out: Path | None = None) -> str:
        """Run it, which must refuse; the one line that says why."""
        code, said, err = self(*arguments, out=out)
        assert code == 2, (said, err)
        lines = [line for line in err.splitlines() if line.startswith("keural: error: ")]
        assert len(lines) == 1, err
        assert "Traceback" not in err
        return lines[0]

    def weights(self, stage: str) -> bytes:
        """The bytes of a stage's weights."""
        return (self.run / stage / "model" / "model.safetensors").read_bytes()


def write_recipe(root: Path) -> None:
    """`recipe` and `data` below `root`; the learning rate of `steady` never falls, that of the others does."""
    draw = random.Random(1)
    sentences = [" ".join(draw.choices(WORDS, k=draw.randint(3, 9))) + "." for _ in range(700)]
    rows: dict[str, list[Any]] = {"prose": [{"text": " ".join(sentences[k : k + 4])} for k in range(0, 600, 3)]}
    rows["chats"] = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in zip(sentences[:120], sentences[120:240], strict=True)
    ]
    rows["pairs"] = [
        {"prompt": asked, "chosen": chosen, "rejected": rejected}
        for asked, chosen, rejected in zip(sentences[:80], sentences[240:320], sentences[400:480], strict=True)
    ]
    (root / "data").mkdir()
    for name, lines in rows.items():
        (root / "data" / f"{name}.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    adapters = {"prose": "text", "chats": "messages", "pairs": "preference"}
    source = {name: [{"name": name, "adapter": adapter, "path": f"{name}.jsonl"}] for name, adapter in adapters.items()}
    source["prose"][0]["language"] = "ko"
    train = {"steps": 6, "lr": 1e-3, "warmup_steps": 2, "save_every": 2}
    recipe = {
        "name": "tiny", "data": str(root / "data"), "model": OF_A_RECIPE, "stages": ["steady", "chat", "align"],
        "tokenizer": {"vocab_size": 360, "sources": source["prose"]},
        "evaluation": {"bits_per_byte": [{"name": "prose", "stage": "steady", "max_bytes": 2000}]},
        "chat": {"samples": ["하늘 바다?"], "max_new_tokens": 4},
    }  # fmt: skip
    stages = {
        "steady": ("next_token", "random", "prose", 32, {"batch_tokens": 128, "min_lr": 1e-3}),
        "chat": ("sft", "steady", "chats", 64, {"batch_tokens": 256}),
        "align": ("dpo", "chat", "pairs", 64, {"batch_pairs": 4}),
    }
    (root / "recipe").mkdir()
    (root / "recipe" / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True))
    for name, (objective, init, data, length, batch) in stages.items():
        spec = {
            "name": name, "objective": objective, "init_from": init, "train": train | batch,
            "data": {"sources": source[data], "sequence_length": length, "heldout_per_mille": 50},
        }  # fmt: skip
        (root / "recipe" / f"{name}.yaml").write_text(yaml.safe_dump(spec))


def keural_run(*arguments: object) -> None:
    """The command in this process, which must succeed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["keural", "run", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            assert not stop.code, stop.code  # noqa: PT017 - the command may end by exiting with success


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `recipe`, `data` and the finished run `run`. Do not change it; take `place`."""
    root = tmp_path_factory.mktemp("finished")
    write_recipe(root)
    keural_run(root / "recipe", "--out", root / "run")
    return root


@pytest.fixture(scope="session")
def killed(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory as a process leaves it that was killed in stage `chat` after step 4."""
    run = tmp_path_factory.mktemp("killed") / "run"
    keural_run(finished / "recipe", "--until", "chat", "chat.train.keep_checkpoints=2", "--out", run)
    for path in (run / "chat" / "model", run / "chat" / "checkpoints" / "step-00000006"):
        shutil.rmtree(path)
    for path in (run / "chat" / "done.json", run / "summary.json", run / "report.html", run / "final"):
        path.unlink()
    return run


@pytest.fixture
def place(finished: Path, tmp_path: Path, keural: Callable[..., tuple[int, str, str]]) -> Place:
    """A copy of the finished run that may be changed; the data is the same, and must not be."""
    for name in ("recipe", "run"):
        shutil.copytree(finished / name, tmp_path / name, symlinks=True)
    return Place(tmp_path, keural)


@pytest.fixture
def interrupted(place: Place, killed: Path) -> Place:
    """The same with the run that was killed."""
    shutil.rmtree(place.run)
    shutil.copytree(killed, place.run, symlinks=True)
    return place


def flip(path: Path, place: int = -1, bit: int = 1) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= bit
    path.write_bytes(content)


def rewrite(path: Path, **changes: Any) -> None:
    """Change keys of a checked file as an editor would who knows the checksum: what it says is then believed."""
    content = read_object(path) | changes
    content.pop(CHECKSUM, None)
    write_json(path, {CHECKSUM: fingerprint(content), **content})


@pytest.fixture
def damage() -> Callable[..., None]:
    """Flips one bit of a file."""
    return flip


@pytest.fixture
def change() -> Callable[..., None]:
    """Changes keys of a checked file together with its checksum."""
    return rewrite
