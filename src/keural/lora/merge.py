"""Adapters merged into the model that they were trained on.

In: an adapter and its base, on disk. Out: the merged model's tensors, one at a time, and a whole model directory of them. The sum
is made in float32 and rounded once; with float32 nothing is lost, while bfloat16 drops most of a small adapter.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keural.errors import UserError
from keural.files import check_new
from keural.lora.directory import Adapter, check_base, open_adapter
from keural.lora.targets import Factors
from keural.pretrained.directory import write_model_directory
from keural.pretrained.lineage import UNKNOWN
from keural.pretrained.stored_model import StoredNetwork, load_tokenizer, open_network
from keural.pretrained.weights import TensorInfo, Weights, data_bytes, finite
from keural.recipe import ChatSpec
from keural.tokenizer import KeuralTokenizer

_KEPT = ("recipe", "stage", "fingerprint", "chain", "objectives", "source")
"""Keys of a record that say where weights come from."""


def weights_digest(weights: Weights) -> str:
    """SHA-256 of a model's tensors, by which an adapter knows its base: names, types, shapes and values, however they lie in
    files.
    """
    found = hashlib.sha256()
    for name in sorted(weights.infos):
        info = weights.infos[name]
        found.update(f"{name} {info.dtype} {list(info.shape)}\n".encode())
        found.update(data_bytes(weights.read(name)))
    return found.hexdigest()


def merged_weights(base: Weights, factors: Mapping[str, Factors], dtype: torch.dtype) -> Weights:
    """The tensors of a model directory with adapters in them, in `dtype`; each is read, summed in float32 and rounded once.

    `factors` are by names in memory, see `Adapter.factors`.
    """
    infos = {name: TensorInfo(info.shape, dtype) for name, info in base.infos.items()}

    def read(name: str) -> Tensor:
        tensor = base.read(name).float()
        delta = _delta(name, factors)
        return (tensor if delta is None else tensor + delta).to(dtype)

    return Weights(infos, read)


def _delta(name: str, factors: Mapping[str, Factors]) -> Tensor | None:
    """What adapters add to a stored tensor; None for one that has none."""
    if name in factors:
        found = factors[name]
        return found.scaling * (found.up @ found.down)
    block, separator, rest = name.partition(".mlp.experts.")
    if not separator:
        return None
    expert, kind, _ = rest.split(".")
    fused = factors.get(f"{block}.mlp.experts.{'down_proj' if kind == 'down_proj' else 'gate_up_proj'}")
    if fused is None:
        return None
    up = fused.up[int(expert)]
    if kind != "down_proj":
        up = up.chunk(2)[kind == "up_proj"]  # gate rows come first
    return fused.scaling * (up @ fused.down[int(expert)])


def merge(
    path: Path,
    out: Path,
    base: Path | None = None,
    dtype: torch.dtype = torch.float32,
    advance: Callable[[int], None] = lambda count: None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the model that an adapter and its base are together to the new directory `out`.

    Args:
        path: an adapter directory, or a stage that was trained with `lora`.
        out: must not exist, or be empty.
        base: the model that the adapter was trained on; by default where it was then.
        dtype: of the merged tensors.
        advance: is told the bytes that were read.
        say: is told when something could not be verified.

    Raises `UserError` for another base, and as `open_adapter`, `Adapter.factors` and `open_network` do.
    """
    check_new(out)
    merged = open_merged(open_adapter(path), base, dtype, advance)
    for line in merged.notices:
        say(line)
    check_new(out, merged.weights.nbytes)
    stored = merged.base
    tokenizer = load_tokenizer(stored.directory) if stored.has_tokenizer else None
    return merged.write(out, tokenizer, merged.chat, ends=replace(stored, lineage=merged.lineage).ends)


def write_merged(path: Path, base: Path, out: Path, tokenizer: KeuralTokenizer, chat: ChatSpec) -> Path:
    """The float32 model directory of a stage's new adapter; replaces an earlier one."""
    return open_merged(open_adapter(path), base).write(out, tokenizer, chat)


@dataclass(frozen=True)
class Merged:
    """An adapter in its base, before anything is written."""

    adapter: Adapter
    base: StoredNetwork
    weights: Weights
    lineage: dict[str, Any]

    @property
    def notices(self) -> list[str]:
        """What could not be verified."""
        lines = [self.base.notice] if self.base.notice else []
        if self.adapter.base_digest is None:
            where = self.base.directory
            lines.append(f"{self.adapter.directory}: no record names its base, so whether {where} is it could not be verified")
        return lines

    @property
    def chat(self) -> ChatSpec:
        """Sampling defaults and system message, the adapter's where it has some."""
        return ChatSpec(**(self.adapter.record.get("chat") or {})) if self.adapter.record else self.base.chat

    def write(self, out: Path, tokenizer: KeuralTokenizer | None, chat: ChatSpec, ends: Sequence[int] | None = None) -> Path:
        """Write the model directory."""
        return write_model_directory(out, self.base.config, self.weights, tokenizer, self.lineage, chat, ends=ends)


def open_merged(
    adapter: Adapter,
    base: Path | None = None,
    dtype: torch.dtype = torch.float32,
    advance: Callable[[int], None] = lambda count: None,
) -> Merged:
    """An adapter in its base, both verified; the tensors are merged as they are read. Raises `UserError` for another base."""
    stored = _open_base(adapter, base)
    factors = adapter.factors(stored.config)
    digest = weights_digest(stored.weights.watched(advance))
    check_base(adapter, digest, stored.directory)
    weights = finite(adapter.directory, merged_weights(stored.weights, factors, dtype)).watched(advance)
    return Merged(adapter, stored, weights, _lineage(adapter, stored, digest))


def _open_base(adapter: Adapter, base: Path | None) -> StoredNetwork:
    """The model that an adapter was trained on, verified. Raises `UserError` when it is not there, and as `open_network`."""
    where = base or adapter.stated_base
    if where is None:
        raise UserError(f"{adapter.directory}: the model that it was trained on is not where it was; name it with --base")
    return open_network(where)


def _lineage(adapter: Adapter, stored: StoredNetwork, digest: str) -> dict[str, Any]:
    """Where a merged model comes from: what the adapter's record says, else that of its base and that a stage is not known."""
    about = {"base": digest, "rank": adapter.rank, "alpha": adapter.alpha, "names": list(adapter.names), "merged": True}
    told = adapter.record or {**stored.lineage, "stage": None, "fingerprint": None}
    kept = {key: told[key] for key in _KEPT if told.get(key) is not None}
    if not adapter.record:
        kept["objectives"] = [*stored.lineage.get("objectives", [UNKNOWN]), UNKNOWN]
    return {**kept, "adapter": about}
