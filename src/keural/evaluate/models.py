"""Models that can be evaluated: what determines their results, known before any weights are read.

In: a model directory, how it is to be asked. Out: an `EvaluatedModel`: its identity at once, its network when something is left to
be computed. Nothing here needs torch until then.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from keural.errors import UserError
from keural.evaluate.results.store import ModelIdentity
from keural.evaluate.tasks.asking import Asking, Prompting, TooLong
from keural.files import FileHashes, fingerprint, read_object
from keural.pretrained.lineage import contents_of, file_name, is_base, read_record
from keural.pretrained.location import CONFIG, check_kind, model_directory
from keural.tokenizer import KeuralTokenizer

if TYPE_CHECKING:
    from keural.evaluate.scoring.network import Network
    from keural.model import KeuralMoECausalLM

Dtype = Literal["stored", "float32", "bfloat16", "float16"]
ENGINE = "transformers"
UNTRAINED = "untrained"
"""What the model before its first step is called."""
TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Conditions:
    """How models are asked."""

    prompting: Prompting = "bos"
    dtype: Dtype = "stored"
    engine: str = ENGINE
    too_long: TooLong = "leave-out"
    system: str | None = None
    """System turn of chats."""

    def __post_init__(self) -> None:
        if self.engine != ENGINE:
            raise UserError(
                f"--engine {self.engine}: log-probabilities of given texts are computed by {ENGINE} alone; leave --engine out"
            )
        if self.system is not None and self.prompting != "chat":
            raise UserError("--system is for chats; give --chat, too")


class EvaluatedModel:
    """A model with the conditions it is asked under; its network is loaded when it is first used."""

    def __init__(
        self, identity: ModelIdentity, directory: Path, conditions: Conditions, load: Callable[[], "KeuralMoECausalLM"]
    ) -> None:
        """`directory` has the configuration and the tokenizer; `load` gives the network in evaluation mode, on the CPU."""
        self.identity, self.directory, self.conditions, self._load = identity, directory, conditions, load

    @property
    def name(self) -> str:
        """What it is called."""
        return self.identity.name

    @functools.cached_property
    def asking(self) -> Asking:
        """Its tokenizer and how it is asked."""
        length = read_object(self.directory / CONFIG).get("max_position_embeddings")
        if not isinstance(length, int) or length < 1:
            raise UserError(f"{self.directory / CONFIG}: max_position_embeddings is {length!r:.40}; it says how much can be read")
        tokenizer = KeuralTokenizer.load(self.directory)
        return Asking(tokenizer, self.conditions.prompting, length, self.conditions.too_long, self.conditions.system)

    @functools.cached_property
    def network(self) -> "Network":
        """The network, on the GPU where there is one. Raises `UserError` for weights that are damaged or not the tokenizer's."""
        import torch

        from keural.evaluate.scoring.network import Network

        model = self._load()
        if self.conditions.dtype != "stored":
            model = model.to(getattr(torch, self.conditions.dtype))
        if torch.cuda.is_available():
            model = model.to("cuda")
        return Network(model, self.asking.tokenizer)

    def close(self) -> None:
        """Give the network's memory back."""
        self.__dict__.pop("network", None)


def stored_model(path: Path, conditions: Conditions, name: str | None = None, hashes: FileHashes | None = None) -> EvaluatedModel:
    """The model in a directory, also a stage's or a run's.

    It is known by the bytes of its files, not by what its record says of them: each is read once, and again only when `hashes`
    does not know it as it is. Raises `UserError` where there is none, it is not what its record lists, or it cannot be asked so.
    """
    directory = model_directory(path)
    check_kind(directory)
    if not (directory / "tokenizer.model").is_file():
        raise UserError(f"{directory}: has no tokenizer.model, which this needs; import the model again with --tokenizer")
    if conditions.prompting == "chat" and (reason := why_no_chats(directory)):
        raise UserError(f"{directory}: {reason}, and cannot be asked in a chat; leave --chat out")
    files = contents_of(directory, (hashes or FileHashes()).of)
    tokenizer = files.pop("tokenizer.model")
    identity = _identity(name or name_of(directory), fingerprint(files), tokenizer, conditions)
    return EvaluatedModel(identity, directory, conditions, lambda: _read(directory, conditions))


def untrained_model(directory: Path, seed: int, conditions: Conditions) -> EvaluatedModel:
    """The network of a model directory with the weights that it began with, drawn from the seed."""
    files = contents_of(directory, weights=False)
    weights = fingerprint({"untrained": files["config.json"], "seed": seed})
    return EvaluatedModel(
        _identity(UNTRAINED, weights, files["tokenizer.model"], conditions), directory, conditions, lambda: _draw(directory, seed)
    )


def why_no_chats(directory: Path) -> str | None:
    """Why a model cannot be asked in a chat; None where it can."""
    if not (directory / TEMPLATE).is_file():
        return f"has no chat template ({TEMPLATE})"
    if is_base(read_record(directory)):
        return "was trained on documents alone, so that it knows no turns"
    return None


def name_of(directory: Path) -> str:
    """What a model is called in files: its recipe and stage, else its directory."""
    record = read_record(directory)
    recipe, stage = record.get("recipe"), record.get("stage")
    return file_name(f"{recipe}-{stage}" if recipe and stage else directory.name)


def _identity(name: str, weights: str, tokenizer: str, conditions: Conditions) -> ModelIdentity:
    template = ""
    if conditions.prompting == "chat":
        template = fingerprint({"renderer": "chatml", "system": conditions.system})
    return ModelIdentity(name, weights, tokenizer, conditions.prompting, template, conditions.dtype, conditions.engine)


def _read(directory: Path, conditions: Conditions) -> Any:
    import torch

    from keural.pretrained.stored_model import build, open_model
    from keural.terminal import say

    stored = open_model(directory)
    if stored.notice:
        say(stored.notice)
    return build(stored, None if conditions.dtype == "stored" else getattr(torch, conditions.dtype))


def _draw(directory: Path, seed: int) -> Any:
    import torch

    from keural.model import KeuralMoECausalLM
    from keural.pretrained.directory import read_config

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return KeuralMoECausalLM(read_config(directory)).eval()
