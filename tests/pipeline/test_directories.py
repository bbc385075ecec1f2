"""Every kind of directory that this package writes, given to every command: it works, or one line says what is there.

A session makes one of each. The table says for each kind which commands work; the others must refuse with exit code 2 and one line
in which the kind is named, and write nothing.
"""

import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from keural.convert.export import ExportOptions, export
from keural.convert.import_checkpoint import import_checkpoint
from keural.convert.initialise import initialise
from keural.pipeline.workspace import build_config
from keural.recipe import load_recipe
from keural.tokenizer import KeuralTokenizer

Keural = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def made(finished: Path, killed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A path of every kind. Nothing here may be changed."""
    root = tmp_path_factory.mktemp("kinds")
    run = finished / "run"
    model = run / "align" / "model"
    for name in ("hf", "granite", "gguf", "pt"):
        export(model, root / name, name, ExportOptions())
    import_checkpoint(root / "pt", root / "imported", say=lambda line: None)
    shutil.copytree(root / "pt", root / "bare-pt")
    for file in ("keural_tokenizer.model", "keural.json"):
        (root / "bare-pt" / file).unlink()
    import_checkpoint(root / "bare-pt", root / "imported-bare", say=lambda line: None)
    recipe, tokenizer = load_recipe(finished / "recipe", ()), KeuralTokenizer.load(run / "tokenizer")
    initialise(root / "init", build_config(recipe, tokenizer), tokenizer, recipe="tiny", chat=recipe.spec.chat, seed=1)
    shutil.copytree(root / "hf", root / "no-record")
    (root / "no-record" / "keural.json").unlink()
    begun = Path(shutil.copytree(killed, root / "begun", symlinks=True))
    shutil.rmtree(begun / "steady" / "model")
    (begun / "steady" / "done.json").unlink()
    (root / "empty").mkdir()
    (root / "adapter").mkdir()
    (root / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    shutil.copy(root / "hf" / "model.safetensors", root / "adapter" / "adapter_model.safetensors")
    (root / "strangers").mkdir()
    (root / "strangers" / "notes.txt").write_text("nothing of ours")
    (root / "bundle").mkdir()
    for file in ("a.gguf", "b.gguf"):
        shutil.copy(next((root / "gguf").glob("*.gguf")), root / "bundle" / file)
    prepared = next(run.glob("data/*/prepared.json")).parent
    return {
        "run": run,
        "stage": run / "chat",
        "final": run / "final",
        "model": model,
        "imported": root / "imported",
        "imported without tokenizer": root / "imported-bare",
        "init": root / "init",
        "hf": root / "hf",
        "model without record": root / "no-record",
        "granite": root / "granite",
        "gguf": next((root / "gguf").glob("*.gguf")),
        "gguf directory": root / "gguf",
        "several gguf": root / "bundle",
        "pt": next((root / "pt").glob("*.pt")),
        "pt directory": root / "pt",
        "pt without tokenizer": root / "bare-pt",
        "weights": root / "hf" / "model.safetensors",
        "checkpoint": next((run / "chat" / "checkpoints").iterdir()),
        "shard": next((run / "chat" / "checkpoints").glob("*/shard-*")),
        "checkpoints": run / "chat" / "checkpoints",
        "unfinished run": killed,
        "unfinished stage": killed / "chat",
        "begun run": begun,
        "prepared": prepared,
        "store": prepared / "train",
        "data": run / "data",
        "reference": run / "reference",
        "tokenizer": run / "tokenizer",
        "tokenizer file": run / "tokenizer" / "tokenizer.model",
        "recipe": finished / "recipe",
        "stage file": finished / "recipe" / "chat.yaml",
        "report": run / "report.html",
        "adapter": root / "adapter",
        "adapter weights": root / "adapter" / "adapter_model.safetensors",
        "empty": root / "empty",
        "strangers": root / "strangers",
    }


class Expected(NamedTuple):
    """What the commands make of a kind."""

    works: frozenset[str]
    said: str = ""
    """In the line of every command that does not work."""


MODEL = frozenset({"inspect", "verify", "generate", "chat", "hf", "gguf", "pt", "import", "refresh", "start"})
"""What works with a model directory with its tokenizer. `start`: a stage starts from it."""


def works(*names: str, said: str = "", besides: str = "") -> Expected:
    return Expected((frozenset(names) or MODEL) - frozenset(besides.split()), said)


def refuses(said: str, *but: str) -> Expected:
    return Expected(frozenset(but), said)


KINDS: dict[str, Expected] = {
    "run": works(besides="import", said="is a run; its model is "),
    "stage": works(besides="import", said="is a stage of a run; its model is "),
    "final": works(),
    "model": works(),
    "imported": works(),
    "imported without tokenizer": works(besides="generate chat hf gguf", said="has no tokenizer.model, which this needs"),
    "init": works(),
    "hf": works(),
    "model without record": works(besides="verify start", said="record"),
    "granite": works("inspect", "verify", said="is a model for programs that know granitemoe_swa"),
    "gguf": works("inspect", "verify", "generate", "chat", said="is GGUF; `keural chat`"),
    "gguf directory": works("inspect", "verify", "generate", "chat", said="holds GGUF; `keural chat`"),
    "several gguf": refuses(r"holds 2 GGUF files \(a.gguf, b.gguf\); name one|holds GGUF"),
    "pt": works("inspect", "verify", "import", said="is a checkpoint of PyTorch; `keural import .*.pt NEW`"),
    "pt directory": works("inspect", "verify", "import", said="holds a checkpoint of PyTorch; `keural import"),
    "pt without tokenizer": works("inspect", "verify", "import", said="holds a checkpoint of PyTorch; `keural import"),
    "weights": works("inspect", "verify", "import", said="holds weights alone; give the directory"),
    "checkpoint": refuses("is a checkpoint that training resumes from"),
    "shard": refuses("is a checkpoint that training resumes from"),
    "checkpoints": refuses("holds checkpoints that training resumes from"),
    "unfinished run": refuses("is a run that has not come to its end; finished stages: .*/steady"),
    "unfinished stage": refuses("is a stage that is not finished; `keural run`"),
    "begun run": refuses("is a run in which no stage is finished"),
    "prepared": refuses("is prepared data; `keural data stats", "stats"),
    "store": refuses("is a token store; `keural data stats", "stats"),
    "data": refuses("holds the prepared data of a run"),
    "reference": refuses("is no directory that this package has written"),
    "tokenizer": refuses("is a tokenizer; `keural tokenizer report"),
    "tokenizer file": refuses("is a tokenizer; `keural tokenizer report"),
    "recipe": refuses("is a recipe; `keural run", "stats"),
    "stage file": refuses("is a file of a recipe; `keural run`"),
    "report": refuses("is a file, and no model"),
    "adapter": refuses("is an adapter, not a model; `keural merge .*/adapter --to NEW`"),
    "adapter weights": refuses("is an adapter, not a model; `keural merge .*/adapter --to NEW`"),
    "empty": refuses("is empty"),
    "strangers": refuses("is no directory that this package has written"),
}


def commands(path: Path, finished: Path, out: Path) -> dict[str, list[object]]:
    """Every command that takes a model or data, on `path`."""
    few = ["--max-new-tokens", "2"]
    start = ["run", finished / "recipe", "--until", "steady", f"steady.init_from={path}", "--out", out]
    return {
        "inspect": ["inspect", path],
        "verify": ["inspect", path, "--verify"],
        "generate": ["generate", path, "--prompt", "하늘", *few],
        "chat": ["chat", path, *few],
        **{name: ["export", path, out / "x", "--format", name] for name in ("hf", "gguf", "pt")},
        "import": ["import", path, out / "x"],
        "refresh": ["refresh-code", path],
        "stats": ["data", "stats", path],
        "start": start,
    }


REFUSING = ("inspect", "generate", "hf", "import", "refresh", "stats", "start")
"""Commands that refuse on ways of their own; the others share one with these."""
PAIRS = [
    (kind, command)
    for kind, expected in KINDS.items()
    for command in commands(Path(), Path(), Path())
    if command in expected.works or command in REFUSING
]


@pytest.mark.parametrize(("kind", "command"), PAIRS)
def test_a_command_works_or_says_what_is_there(
    made: dict[str, Path], finished: Path, tmp_path: Path, keural: Keural, monkeypatch: pytest.MonkeyPatch, kind: str, command: str
) -> None:
    if command in {"generate", "chat"} and "gguf" in kind:
        pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra llama; make setup-llama)")
    if command in {"gguf", "inspect", "verify"} and "gguf" in (command, *kind.split()):
        pytest.importorskip("gguf", reason="the gguf package is not installed (extra gguf)")
    monkeypatch.setattr("sys.stdin", io.StringIO("하늘\n"))
    out = tmp_path / "out"

    code, said, err = keural(*commands(made[kind], finished, out)[command])

    if command in KINDS[kind].works:
        assert code == 0, (said, err)
        return
    assert code == 2, (said, err)
    assert err.count("\n") == 1, err
    wanted = KINDS[kind].said if command != "stats" or kind not in MODELS else "is a (model|run|stage of a run);"
    assert re.search(wanted, err), err
    assert not (out / "x").exists()


MODELS = {kind for kind, expected in KINDS.items() if {"hf", "pt"} & expected.works} | {"granite"}
"""Kinds that `keural data stats` calls models, whatever else refuses them."""


def test_every_kind_is_in_the_table(made: dict[str, Path]) -> None:
    assert made.keys() == KINDS.keys()


def test_a_line_names_only_what_exists(made: dict[str, Path], keural: Keural) -> None:
    """The path that a refusal advises is one that the command takes."""
    for kind, command in (("run", ["import"]), ("stage", ["import"])):
        err = keural(*command, made[kind], made["empty"] / "x")[2]
        advised = Path(err.split("its model is ")[1].split(")")[0])
        assert keural("inspect", advised)[0] == 0, (kind, advised)
    err = keural("inspect", made["unfinished run"])[2]
    advised = Path(err.split("finished stages: ")[1].split(")")[0])
    assert keural("inspect", advised)[0] == 0
