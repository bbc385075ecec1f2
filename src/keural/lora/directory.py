"""Adapter directories: what a stage with `lora` leaves behind beside its model, as PEFT reads and writes them.

In: a path that may come from a stranger. Out: an `Adapter` of which everything that is used was checked: settings that mean exactly
what this package computes, factors of the right names and shapes, finite, in safetensors. Nothing needs PEFT here, and nothing of
the directory is run.

    adapter_config.json  adapter_model.safetensors  README.md  keural.json (the record, with the digest of the base)
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keural.errors import UserError, quoted
from keural.files import read_object
from keural.limits import LARGEST
from keural.lora.targets import ATTENTION, EXPERTS, ROUTER, Factors, Shape, adapted_shapes, factors_of, stored_names
from keural.model import KeuralConfig
from keural.pretrained.kinds import what_is
from keural.pretrained.lineage import LINEAGE, check_sums, read_record
from keural.pretrained.safetensors import open_safetensors
from keural.pretrained.weights import Weights, finite

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIRECTORY = "adapter"
"""Of a stage."""
LARGEST_RANK = 2**16
_FREE = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "lora_alpha", "megatron_core", "peft_type", "peft_version",
     "qalora_group_size", "r", "revision", "runtime_config", "target_modules", "target_parameters", "task_type"}
)  # fmt: skip
"""Keys of PEFT's configuration that are read here, or that change nothing of what an adapter computes."""
_DRAWN = (True, False, "gaussian", "orthogonal")
"""Values of `init_lora_weights` that leave the base as it is; others (PiSSA, CorDA, …) take something away from it."""
_PARAMETERS = {**{f"mlp.experts.{name}": name for name in EXPERTS}, f"mlp.{ROUTER}.weight": ROUTER}
"""PEFT's `target_parameters`, and the short name of each."""


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk; its factors are known by name and are checked against a network by `factors`."""

    directory: Path
    rank: int
    alpha: float
    names: tuple[str, ...]
    """Short names of the parameters that have one."""
    weights: Weights
    record: Mapping[str, Any]
    """What `keural.json` says; empty where there is none."""
    base_digest: str | None
    """`weights_digest` of the model that it was trained on; None where there is no record."""
    stated_base: Path | None
    """Where the base was when the adapter was made, if there is something."""

    def factors(self, config: KeuralConfig) -> dict[str, Factors]:
        """The factors of each adapted parameter of a network of this shape, by the parameter's name in memory; all are read.

        Raises `UserError` unless the files hold exactly these, each in its shape and finite.
        """
        shapes = adapted_shapes(config, self.names)
        places = min((stored_names(shapes, within) for within in EXPERTS), key=lambda places: len(_misfits(places, shapes, self)))
        if misfits := _misfits(places, shapes, self):
            raise UserError(f"{self.directory / WEIGHTS}: {misfits[0]}; the adapter belongs to another network or is damaged")
        known = {f"{place}.lora_{side}.weight" for place in places.values() for side in "AB"}
        if unknown := sorted(self.weights.infos.keys() - known):
            raise UserError(
                f"{self.directory / WEIGHTS}: tensor {quoted(unknown[0])} is none of an adapter of {', '.join(self.names)} over "
                f"{config.num_hidden_layers} layers"
            )
        read, scaling = self.weights.read, self.alpha / self.rank
        return {
            name: factors_of(
                read(f"{places[name]}.lora_A.weight").float(), read(f"{places[name]}.lora_B.weight").float(), shape.experts, scaling
            )
            for name, shape in shapes.items()
        }


def _misfits(places: Mapping[str, str], shapes: Mapping[str, Shape], adapter: Adapter) -> list[str]:
    """What is missing or of another shape."""
    found = []
    for name, shape in shapes.items():
        for side, wanted in zip("AB", shape.stored(adapter.rank), strict=True):
            tensor = f"{places[name]}.lora_{side}.weight"
            info = adapter.weights.infos.get(tensor)
            if info is None:
                found.append(f"tensor {tensor} is missing")
            elif info.shape != wanted:
                found.append(f"tensor {tensor} has shape {list(info.shape)} instead of {list(wanted)}")
    return found


def adapter_directory(path: Path) -> Path:
    """The adapter directory that `path` stands for: itself, or the `adapter` of a stage. Raises `UserError` where there is none."""
    for candidate in (path, path / DIRECTORY):
        if (candidate / CONFIG).is_file():
            return candidate
    if not path.exists():
        raise UserError(f"{path}: no such directory; give an adapter directory, or a stage that was trained with lora")
    raise UserError(f"{path}: {what_is(path)} (not an adapter: no {CONFIG} there)")


def open_adapter(path: Path) -> Adapter:
    """Open an adapter directory, or that of a stage; every file is compared with the record, where there is one.

    Raises `UserError` for anything that is not exactly a LoRA adapter of this network's attention, experts or router: another kind,
    a setting that would change what is computed, a pickled file, a damaged file or one that the record does not list.
    """
    directory = adapter_directory(path)
    values = read_object(directory / CONFIG)
    check_sums(directory)
    record = read_record(directory)
    if not (directory / WEIGHTS).is_file() and (other := next(directory.glob("adapter_model.*"), None)):
        raise UserError(f"{other}: adapters are read from safetensors alone; save it again as {WEIGHTS}")
    file = directory / CONFIG
    _check_meaning(file, values)
    rank, alpha = values.get("r"), values.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank <= LARGEST_RANK:
        raise UserError(f"{file}: r must be a whole number from 1 to {LARGEST_RANK:,}, got {quoted(rank)}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha <= LARGEST:
        raise UserError(f"{file}: lora_alpha must be a number above 0, of at most {LARGEST:,}, got {quoted(alpha)}")
    return Adapter(
        directory=directory,
        rank=rank,
        alpha=float(alpha),
        names=_targets(file, values),
        weights=finite(directory, open_safetensors([directory / WEIGHTS])),
        record=record,
        base_digest=_base_digest(directory, record),
        stated_base=_stated_base(values.get("base_model_name_or_path")),
    )


def _base_digest(directory: Path, record: Mapping[str, Any]) -> str | None:
    """The digest of the base in an adapter's record. Raises `UserError` when there is a record without one."""
    if not record:
        return None
    about = record.get("adapter")
    digest = about.get("base") if isinstance(about, dict) else None
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise UserError(f"{directory / LINEAGE}: names no base of an adapter; remove it to merge the adapter unverified")
    return digest


def _stated_base(value: Any) -> Path | None:
    try:
        return Path(value) if isinstance(value, str) and value and Path(value).exists() else None
    except (OSError, ValueError):  # no path that this system can have
        return None


def _check_meaning(file: Path, values: Mapping[str, Any]) -> None:
    """Refuse every setting that is not read here and says something: what it changes would be left out of the model."""
    if (kind := values.get("peft_type")) != "LORA":
        raise UserError(f"{file}: is an adapter of kind {quoted(kind)}; only LORA can be merged")
    if (drawn := values.get("init_lora_weights", True)) not in _DRAWN:
        raise UserError(f"{file}: init_lora_weights {quoted(drawn)} changes the base; save the adapter converted to plain LoRA")
    for key, value in values.items():
        if key not in _FREE and key != "init_lora_weights" and value not in (None, False, 0, "none", "", [], {}):
            raise UserError(f"{file}: {quoted(key)} {quoted(value)} is not understood, so what it changes would be left out")


def _targets(file: Path, values: Mapping[str, Any]) -> tuple[str, ...]:
    """Short names of the adapted parameters, in the network's order."""
    modules = _names(file, "target_modules", values.get("target_modules") or [], ATTENTION)
    parameters = _names(file, "target_parameters", values.get("target_parameters") or [], _PARAMETERS)
    found = {*modules, *(_PARAMETERS[name] for name in parameters)}
    if not found:
        raise UserError(f"{file}: names no targets")
    return tuple(name for name in (*ATTENTION, ROUTER, *EXPERTS) if name in found)


def _names(file: Path, key: str, value: Any, known: Collection[str]) -> list[str]:
    names = value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str) or name not in known:
            raise UserError(f"{file}: {key} {quoted(name)}: adapters are understood of {', '.join(known)}")
    return names


def check_base(adapter: Adapter, digest: str, base: Path) -> None:
    """Raise `UserError` unless the weights in `base`, of this digest, are those that the adapter was trained on."""
    if adapter.base_digest is not None and adapter.base_digest != digest:
        raise UserError(
            f"{base}: is not the model that {adapter.directory} was trained on (SHA-256 of its tensors {digest[:12]}…, and "
            f"{LINEAGE} names {adapter.base_digest[:12]}…); give that one with --base"
        )
