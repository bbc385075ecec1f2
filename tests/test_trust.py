"""Nothing that lies in a run, model, store or data directory runs code: payloads stay data, and nothing is ever unpickled."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from keural.cli.app import main
from keural.files import fingerprint, sha256_file
from tests.helpers.shapes import OF_A_RECIPE

Keural = Callable[..., tuple[int, str, str]]
WATCHED = """
import json, os, sys
root, log, commands = os.path.realpath(sys.argv[1]), open(sys.argv[2], "a"), json.loads(sys.argv[3])

def watch(event, arguments):
    if event == "pickle.find_class":
        print(event, *arguments, file=log, flush=True)
    elif event == "exec" and os.path.realpath(getattr(arguments[0], "co_filename", "")).startswith(root):
        print(event, arguments[0].co_filename, file=log, flush=True)

sys.addaudithook(watch)
from keural.cli.app import main
for command in commands:
    sys.argv = ["keural", *command]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, command
"""
"""Runs commands and writes down what pickles ask for, and what code from below a directory is executed."""


def write_recipe(root: Path) -> None:
    """Two stages on text that the test makes: one with checkpoints, one with reference values."""
    draw = np.random.default_rng(0)
    words = ["".join(chr(code) for code in draw.integers(0xAC00, 0xAC18, 2)) for _ in range(40)] + ["sea", "sky", "tree", "cloud"]
    lines = [" ".join(draw.choice(words, size=6)) + "." for _ in range(240)]
    (root / "data").mkdir()
    (root / "data" / "prose.jsonl").write_text("".join(json.dumps({"text": " ".join([line] * 3)}) + "\n" for line in lines))
    rows = [{"prompt": a, "chosen": b, "rejected": c} for a, b, c in zip(lines[:80], lines[80:160], lines[160:], strict=True)]
    (root / "data" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prose = [{"name": "prose", "adapter": "text", "path": "prose.jsonl", "language": "ko"}]
    pairs = [{"name": "pairs", "adapter": "preference", "path": "pairs.jsonl"}]
    train = {"steps": 4, "lr": 1e-3, "warmup_steps": 1, "save_every": 2}
    files: dict[str, Any] = {
        "recipe": {
            "name": "tiny", "data": str(root / "data"), "model": OF_A_RECIPE, "stages": ["base", "align"],
            "tokenizer": {"vocab_size": 370, "sources": prose}, "chat": {"samples": ["하늘"], "max_new_tokens": 4},
            "evaluation": {"bits_per_byte": [{"name": "prose", "stage": "base", "max_bytes": 2000}]},
        },
        "base": {
            "name": "base", "objective": "next_token", "train": train | {"batch_tokens": 128},
            "data": {"sources": prose, "sequence_length": 32, "heldout_per_mille": 50},
        },
        "align": {
            "name": "align", "objective": "dpo", "init_from": "base", "train": train | {"batch_pairs": 4},
            "data": {"sources": pairs, "sequence_length": 64, "heldout_per_mille": 50},
        },
    }  # fmt: skip
    (root / "recipe").mkdir()
    for name, content in files.items():
        (root / "recipe" / f"{name}.yaml").write_text(yaml.safe_dump(content, allow_unicode=True))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `recipe`, `data` and the run `run`, whose last stage has a checkpoint and is not marked as finished."""
    root = tmp_path_factory.mktemp("trust")
    write_recipe(root)
    patch = pytest.MonkeyPatch()
    with patch.context():
        patch.setattr(sys, "argv", ["keural", "run", str(root / "recipe"), "--out", str(root / "run")])
        try:
            main()
        except SystemExit as stop:
            assert not stop.code, stop.code  # noqa: PT017 - the command may end by exiting with success
    (root / "run" / "align" / "done.json").unlink()
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "run", tmp_path / "run", symlinks=True)
    return tmp_path


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def payloads(file: Path, mark: Path) -> Iterator[bytes]:
    """Contents that would touch `mark` if they were run: as a pickle, and in the language of the file's kind."""
    yield pickle.dumps(Payload(mark))
    if file.suffix == ".npy":
        scratch = mark.with_suffix(".npy")
        np.save(scratch, np.array([Payload(mark)], dtype=object), allow_pickle=True)
        yield scratch.read_bytes()
    elif file.suffix in {".safetensors", ".ds", ".plan", ".index", ".model"}:
        scratch = mark.with_suffix(".pt")
        torch.save(Payload(mark), scratch)
        yield scratch.read_bytes()
    elif file.suffix == ".py":
        yield f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n".encode()
    elif file.suffix in {".yaml", ".json", ".jsonl"}:
        yield f"!!python/object/apply:os.system ['touch {mark}']\n".encode()
    elif file.suffix == ".jinja":
        yield ("{{ cycler.__init__.__globals__.os.system('touch " + str(mark) + "') }}").encode()


def plant(root: Path, file: Path, content: bytes) -> None:
    """Put `content` into a file and make every checksum in the JSON files of `root` agree, as somebody would who wants it read."""
    before = sha256_file(file)
    file.write_bytes(content)
    for other in root.rglob("*.json"):
        if other == file or before not in other.read_text(errors="replace"):
            continue
        values = json.loads(other.read_text().replace(before, sha256_file(file)))
        if "checksum" in values:
            values["checksum"] = fingerprint({key: value for key, value in values.items() if key != "checksum"})
        other.write_text(json.dumps(values))


def commands(made: Path, place: Path) -> list[list[object]]:
    """Everything that reads a run, cheapest first."""
    model = place / "run" / "base" / "model"
    return [
        ["inspect", model, "--verify"],
        ["generate", model, "--prompt", "hi", "--max-new-tokens", "1"],
        ["export", model, place / "out", "--format", "hf"],
        ["run", made / "recipe", "--out", place / "run"],
    ]


def check_nothing_runs(made: Path, place: Path, keural: Keural, name: str) -> None:
    mark = place / "ran"
    (found,) = (place / "run").glob(name)
    name = str(found.relative_to(place / "run"))
    original = found.read_bytes()
    for content in payloads(place / "run" / name, mark):
        plant(place / "run", place / "run" / name, content)
        for command in commands(made, place):
            code, _, err = keural(*command)
            assert not mark.exists(), (name, command)
            assert code in {0, 2}, (name, command, err)
            assert "Traceback" not in err, (name, command, err)
        shutil.rmtree(place / "run")
        shutil.rmtree(place / "out", ignore_errors=True)
        shutil.copytree(made / "run", place / "run", symlinks=True)
        assert (place / "run" / name).read_bytes() == original


QUICK = (
    "align/checkpoints/step-00000004/shard-00001-model-00001-of-00001.safetensors",
    "align/checkpoints/step-00000004/manifest.json",
    "reference/*/pairs.bin",
    "reference/*/manifest.json",
    "base/model/modeling_keural.py",
    "base/model/model.safetensors",
    "base/model/chat_template.jinja",
)


@pytest.mark.parametrize("name", QUICK)
def test_a_payload_in_a_file_that_is_read_stays_data(made: Path, place: Path, keural: Keural, name: str) -> None:
    check_nothing_runs(made, place, keural, name)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_payload_in_any_file_of_a_run_stays_data(made: Path, place: Path, keural: Keural) -> None:
    for file in sorted(path.relative_to(made / "run") for path in (made / "run").rglob("*") if path.is_file()):
        check_nothing_runs(made, place, keural, str(file))


ADDED = (
    "__init__.py", "sitecustomize.py", "conftest.py", "config.py", "torch.py", "tokenization_keural.py", "model.py", ".metadata",
    "executor.pik", "pytorch_model.bin", "__0_0.distcp", "custom_generate/generate.py", "additional_chat_templates/tool_use.jinja",
)  # fmt: skip


@pytest.mark.parametrize("name", ADDED)
def test_a_file_that_somebody_added_to_every_directory_is_not_run(made: Path, place: Path, keural: Keural, name: str) -> None:
    mark = place / "ran"
    for directory in [place / "run", *(path for path in (place / "run").rglob("*") if path.is_dir() and not path.is_symlink())]:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(list(payloads(Path(name), mark))[-1])

    for command in commands(made, place):
        code, _, err = keural(*command)
        assert not mark.exists(), command
        assert code in {0, 2}, (command, err)
        assert "Traceback" not in err, (command, err)


def test_no_command_unpickles_anything_or_runs_code_of_a_directory(made: Path, place: Path) -> None:
    """Whatever a pickle names goes through one function of the interpreter, which an audit hook sees."""
    log = place / "audit.log"
    model, run = place / "run" / "base" / "model", ["run", str(made / "recipe"), "--out", str(place / "run")]
    watched = [
        run,
        ["inspect", str(model), "--verify"],
        ["generate", str(model), "--prompt", "hi", "--max-new-tokens", "1"],
        *(["export", str(model), str(place / name), "--format", name] for name in ("hf", "granite", "pt")),
        ["import", str(place / "pt"), str(place / "again")],
        ["inspect", str(place / "pt"), "--verify"],
    ]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    program = [sys.executable, "-c", WATCHED, str(place), str(log), json.dumps(watched)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert log.read_text() == ""

    (place / "x.pik").write_bytes(pickle.dumps(Payload(place / "ran")))
    reading = f"import pickle; pickle.load(open({str(place / 'x.pik')!r}, 'rb'))"
    program = [sys.executable, "-c", WATCHED.split("from keural")[0] + reading, str(place), str(log), "[]"]
    subprocess.run(program, check=True, env=environment)
    assert "pickle.find_class pathlib" in log.read_text(), "the hook sees nothing"
