"""Help, version and every refusal that needs no weights are there at once: a typing mistake does not wait for torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from keural.cli import options
from keural.errors import UserError
from tests.helpers.forks import Ended, Job, run_in_forks

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
    "experts divided among processes that are not there": (["run", "toy", "train.expert_parallel=2"], "needs a multiple of 2 proc"),
    "a share of nothing": (["plan", "toy", "--mfu", "1e-320"], "--mfu 1e-320: is a share"),
    "a file that is no recipe": (["plan", "here/notes.txt"], "here/notes.txt: is a file, and a recipe is a directory"),
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
    "a model to evaluate that is not there": (["evaluate", "nowhere"], "no such directory"),
    "a directory called model that cannot be evaluated": (["evaluate", "model"], "has no tokenizer.model"),
    "a model as the usage writes it": (["evaluate", "model", "--data", "here", "nowhere"], "nowhere: no such directory"),
    "nothing to compare": (["evaluate", "compare", "here", "here"], "has no results"),
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
    "the tasks": ["evaluate", "--list"],
    "a key": ["recipe", "--explain", "train.lr"],
}


def make(directory: Path) -> Path:
    """A directory with what the commands name: one that holds nothing of use, a foreign model, and one that could be ours."""
    (directory / "here").mkdir(parents=True)
    (directory / "here" / "notes.txt").write_text("nothing")
    for name, kind in {"llama": "llama", "model": "keural"}.items():
        (directory / name).mkdir()
        (directory / name / "config.json").write_text(json.dumps({"model_type": kind}))
    return directory


Commands = dict[str, tuple[Path, Ended]]
"""The directory that each was given in, and how it ended."""


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    """Every command, each in an interpreter of its own that has imported what all of them import."""
    given = {name: arguments for name, (arguments, _) in REFUSALS.items()} | ANSWERS
    place = tmp_path_factory.mktemp("commands")
    jobs = {name: Job(RUN, make(place / str(number)), given[name]) for number, name in enumerate(given)}
    return {
        name: (jobs[name].directory, ended)
        for name, ended in run_in_forks("import keural.cli.app, keural.recipe.load", jobs).items()
    }


def imported(directory: Path) -> str:
    return (directory / "imported").read_text().strip()


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_needs_no_torch(commands: Commands, name: str) -> None:
    directory, ended = commands[name]
    assert "Traceback" not in ended.error, ended.error
    assert (ended.code, imported(directory)) == (2, "")
    assert REFUSALS[name][1] in ended.error
    assert not (directory / "out").exists()
    assert not (directory / "runs").exists()


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_about_the_package_needs_no_torch(commands: Commands, name: str) -> None:
    directory, ended = commands[name]
    assert (ended.code, imported(directory), ended.error) == (0, "", "")
    assert ended.out


def seconds(directory: Path, *command: str) -> float:
    """Processor seconds of a program from nothing, so that other work on the machine is not counted."""
    before = os.times()
    subprocess.run([sys.executable, "-c", *command], cwd=directory, capture_output=True, check=False, timeout=200)
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


def test_it_takes_some_times_what_its_libraries_take(tmp_path: Path) -> None:
    """Three times as long; seven times would be a second on one machine, and two on another."""
    directory = make(tmp_path / "here")
    programs = [["import pydantic, typer, yaml"], [RUN, "--help"], [RUN, "run", "toy", "trian.lr=1"]]
    libraries, *ours = (min(seconds(directory, *program) for _ in range(2)) for program in programs)
    assert max(ours) < 7 * libraries


def test_a_board_that_is_not_installed_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "find_spec", lambda name: None if name == "wandb" else object())
    assert options.boards(tensorboard=True, wandb=False) == ("tensorboard",)
    with pytest.raises(UserError, match=r"--wandb: the wandb package is not installed: pip install 'keural\[wandb\]'"):
        options.boards(tensorboard=True, wandb=True)
