"""Help, version and every refusal that needs no weights are there at once: a typing mistake does not wait for torch."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from keural.cli import options
from keural.errors import UserError

RUN = """
import sys
from keural.cli.app import main
code = 0
try:
    main()
except SystemExit as stop:
    code = stop.code or 0
print(*sorted({"torch", "transformers"} & set(sys.modules)), file=open("imported", "w"))
sys.exit(code)
"""
REFUSALS: dict[str, tuple[list[str], str]] = {
    "an option that does not exist": (["run", "toy", "--nope"], "--nope"),
    "a command that does not exist": (["rnu"], "rnu"),
    "an argument that is missing": (["run"], "recipe"),
    "an unknown recipe": (["run", "toi"], "did you mean 'toy'"),
    "a recipe's directory without a recipe": (["run", "here"], "without recipe.yaml"),
    "an unknown key": (["run", "toy", "trian.lr=1"], "did you mean 'train'"),
    "an impossible value": (["run", "toy", "pretrain-1.train.lr=-1"], "train.lr"),
    "an unknown last stage": (["run", "toy", "--until", "sft-9"], "did you mean 'sft-"),
    "a data directory that is not given": (["run", "laptop"], "give data=DIR"),
    "a data directory that is not there": (["run", "laptop", "data=nowhere"], "no such directory"),
    "a stage that is not there": (["train", "toy/sft-9.yaml"], "no such stage"),
    "a stage's file that is not there": (["train", "nowhere/sft-1.yaml"], "no such file"),
    "data of an unknown recipe": (["data", "prepare", "toi"], "did you mean 'toy'"),
    "data that is not there": (["data", "stats", "nowhere"], "nowhere"),
    "tokenised data that is not there": (
        ["data", "import", "nowhere", "store", "--format", "megatron", "--tokenizer", "nowhere"],
        "nowhere",
    ),
    "a tokenizer of an unknown recipe": (["tokenizer", "train", "toi"], "did you mean 'toy'"),
    "a tokenizer that is not there": (["tokenizer", "report", "nowhere", "text"], "no such file"),
    "a model that is not there": (["chat", "nowhere"], "no such directory"),
    "a directory that is no model": (["generate", "here", "--prompt", "x"], "no config.json"),
    "a model of another kind": (["chat", "llama"], "describes a 'llama' model"),
    "an unknown engine": (["chat", "llama", "--engine", "llamacpp"], "did you mean 'llama.cpp'"),
    "impossible sampling": (["generate", "model", "--prompt", "x", "--temperature", "inf"], "impossible sampling settings"),
    "an engine that cannot be served": (["serve", "model", "--engine", "transformer"], "did you mean 'transformers'"),
    "a model to serve that is not there": (["serve", "nowhere"], "no such directory"),
    "an address that is none": (["serve", "model", "--host", "nowhere.invalid"], "no such address"),
    "keys that are not there": (["serve", "model", "--api-key-file", "nowhere"], "nowhere"),
    "other machines without keys": (["serve", "model", "--host", "0.0.0.0", "--port", "0"], "--api-key-file"),
    "a checkpoint that is not there": (["import", "nowhere", "out"], "no such file or directory"),
    "an import over something": (["import", "llama", "here"], "exists and is not empty"),
    "a configuration that is not there": (["import", "llama", "out", "--config", "nowhere"], "no such file"),
    "an export of nothing": (["export", "nowhere", "out", "--format", "hf"], "no such directory"),
    "an unknown format": (["export", "model", "out", "--format", "ggfu"], "did you mean 'gguf'"),
    "an option of another format": (["export", "model", "out", "--format", "hf", "--quantize", "q8_0"], "means nothing"),
    "an unknown number format": (["export", "model", "out", "--format", "gguf", "--quantize", "q9_9"], "--quantize q9_9: unknown"),
    "nothing to inspect": (["inspect", "nowhere"], "no such file or directory"),
    "an unknown precision": (["init", "toy", "out", "--dtype", "int8"], "--dtype int8: unknown"),
    "a random model of an unknown recipe": (["init", "toi", "out"], "did you mean 'toy'"),
    "a dense model that is not there": (["init", "toy", "out", "--from-dense", "nowhere"], "no such file or directory"),
    "an unknown key to explain": (["recipe", "--explain", "train.lrr"], "did you mean 'train.lr'"),
    "a copy of nothing": (["recipes", "--copy", "out"], "--copy needs the name"),
}
ANSWERS = {
    "help": ["--help"],
    "version": ["--version"],
    "help of a command": ["run", "--help"],
    "help of a group's command": ["data", "show", "--help"],
    "the recipes": ["recipes"],
    "a recipe": ["recipe", "keural-14b-published"],
    "a key": ["recipe", "--explain", "train.lr"],
}


class Ended(NamedTuple):
    """How a command ended, what it wrote, what it imported, and the processor seconds it took."""

    code: int
    out: str
    error: str
    imported: str
    seconds: float


def keural(directory: Path, *arguments: str) -> Ended:
    """Run the command in a fresh interpreter."""
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], cwd=directory, capture_output=True, text=True, check=False, timeout=200
    )
    after = os.times()
    seconds = after.children_user - before.children_user + after.children_system - before.children_system
    assert "Traceback" not in done.stderr, done.stderr
    return Ended(done.returncode, done.stdout, done.stderr, (directory / "imported").read_text().strip(), seconds)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with what the commands name: one that holds nothing of use, a foreign model, and one that could be ours."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "notes.txt").write_text("nothing")
    for name, kind in {"llama": "llama", "model": "keural"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": kind}))
    return tmp_path


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_needs_no_torch(directory: Path, name: str) -> None:
    arguments, expected = REFUSALS[name]
    ended = keural(directory, *arguments)
    assert (ended.code, ended.imported) == (2, "")
    assert expected in ended.error
    assert not (directory / "out").exists()
    assert not (directory / "runs").exists()


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_about_the_package_needs_no_torch(directory: Path, name: str) -> None:
    ended = keural(directory, *ANSWERS[name])
    assert (ended.code, ended.imported, ended.error) == (0, "", "")
    assert ended.out


@pytest.mark.parametrize("arguments", [["--help"], ["run", "toy", "trian.lr=1"]])
def test_it_takes_less_than_a_second(directory: Path, arguments: list[str]) -> None:
    """Processor seconds, so that other work on the machine is not counted."""
    assert statistics.median(keural(directory, *arguments).seconds for _ in range(5)) < 1


def test_a_board_that_is_not_installed_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "find_spec", lambda name: None if name == "wandb" else object())
    assert options.boards(tensorboard=True, wandb=False) == ("tensorboard",)
    with pytest.raises(UserError, match=r"--wandb: the wandb package is not installed: pip install 'keural\[wandb\]'"):
        options.boards(tensorboard=True, wandb=True)
