"""What lies at a path where something else was wanted, and which command is for it.

In: a path. Out: a line, such as `is a tokenizer; …`. It goes by the names of files alone: nothing is believed and nothing is
opened, it only helps whoever mixed up two of the directories that this package writes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

CHECKPOINT_SUFFIXES = (".pt", ".pth", ".bin")
"""Files of PyTorch that can be imported."""
_SHOWN = 5


class Kind(NamedTuple):
    """Something that a path may be."""

    fits: Callable[[Path], bool]
    line: Callable[[Path], str]
    """What it is and what to do with it."""


def what_is(path: Path) -> str:
    """`is …; …`: what `path` is, and the command that takes it."""
    return next(kind.line(path) for kind in KINDS if kind.fits(path))


def is_training_checkpoint(path: Path) -> bool:
    """Whether `path` is what training resumes from, or a file of it: its tensors are no model's, though they lie in safetensors."""
    return _has("shard-*.safetensors")(path) or (path.name.startswith("shard-") and path.suffix == ".safetensors")


def is_adapter(path: Path) -> bool:
    """Whether `path` is an adapter as PEFT writes it, or the file with its weights, which are no model's; a model beside whose
    files somebody put an adapter's is a model.
    """
    adapter = _has("adapter_config.json")(path) and not _has("config.json")(path)
    return adapter or path.name.startswith("adapter_model.")


def _has(*names: str) -> Callable[[Path], bool]:
    return lambda path: path.is_dir() and any(any(path.glob(name)) for name in names)


def _ends(*suffixes: str) -> Callable[[Path], bool]:
    return lambda path: path.is_file() and path.suffix.lower() in suffixes


def _says(line: str) -> Callable[[Path], str]:
    return lambda path: line.format(path=path)


def _run(path: Path) -> str:
    if (path / "final" / "config.json").is_file():
        return f"is a run; its model is {path / 'final'}"
    finished = sorted(str(config.parents[1]) for config in path.glob("*/model/config.json"))
    if finished:
        return f"is a run that has not come to its end; finished stages: {', '.join(finished[:_SHOWN])}"
    return f"is a run in which no stage is finished; `keural run RECIPE --out {path}` goes on"


_GGUF = "GGUF; `keural chat`, `generate` and `inspect` take it, other commands the model that it was exported from"
_PYTORCH = "a checkpoint of PyTorch; `keural import {path} NEW` makes a model directory of it"
_TOKENIZER = _says("is a tokenizer; `keural tokenizer report {path} TEXT` measures it")
_RESUMED = "that training resumes from; the model is written when the stage ends"


def _adapter(path: Path) -> str:
    directory = path if path.is_dir() else path.parent
    return f"is an adapter, not a model; `keural merge {directory} --to NEW` writes the model that it makes of its base"


KINDS: tuple[Kind, ...] = (
    Kind(_ends(".gguf"), _says(f"is {_GGUF}")),
    Kind(_ends(*CHECKPOINT_SUFFIXES), _says(f"is {_PYTORCH}")),
    Kind(is_training_checkpoint, _says(f"is a checkpoint {_RESUMED}")),
    Kind(is_adapter, _adapter),
    Kind(_ends(".safetensors"), _says("holds weights alone; give the directory that it lies in, or `keural import {path} NEW`")),
    Kind(_ends(".model"), _TOKENIZER),
    Kind(_ends(".yaml", ".yml"), _says("is a file of a recipe; `keural run` takes its directory, `keural train` a stage's file")),
    Kind(lambda path: path.is_file(), _says("is a file, and no model")),
    Kind(_has("run.json"), _run),
    Kind(_has("model/config.json"), _says("is a stage of a run; its model is {path}/model")),
    Kind(_has("stage.json"), _says("is a stage that is not finished; `keural run` on its recipe goes on with it")),
    Kind(_has("step-*/manifest.json"), _says(f"holds checkpoints {_RESUMED}")),
    Kind(_has("config.json"), _says("is a model; `keural inspect {path}` describes it")),
    Kind(_has("prepared.json"), _says("is prepared data; `keural data stats {path}` describes it")),
    Kind(_has("cleaning.json"), _says("is cleaned data; `keural data stats {path}` describes it")),
    Kind(_has("*.ds"), _says("is a token store; `keural data stats {path}` describes it")),
    Kind(_has("*/prepared.json"), _says("holds the prepared data of a run; `keural data stats` takes a directory in it")),
    Kind(_has("*.gguf"), _says(f"holds {_GGUF}")),
    Kind(_has(*(f"*{suffix}" for suffix in CHECKPOINT_SUFFIXES)), _says(f"holds {_PYTORCH}")),
    Kind(_has("tokenizer.model"), _TOKENIZER),
    Kind(_has("recipe.yaml"), _says("is a recipe; `keural run {path}` trains its models")),
    Kind(_has("*.safetensors"), _says("holds weights without a config.json; `keural import {path} NEW --config FILE` takes them")),
    Kind(lambda path: path.is_dir() and not any(path.iterdir()), _says("is empty")),
    Kind(lambda path: True, _says("is no directory that this package has written")),
)
"""The first that fits counts; the last always does."""
