"""Adapters merged into the model that they were trained on.

In: an adapter and its base, on disk. Out: the merged model's tensors, one at a time, and a whole model directory of them. The sum
is made in float32 and rounded once; with float32 nothing is lost, while bfloat16 drops most of a small adapter.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keural.errors import UserError
from keural.files import check_new
from keural.lora.directory import Adapter, check_base, open_adapter
from keural.lora.targets import Factors
from keural.pretrained.directory import write_model_directory
from keural.pretrained.lineage import UNKNOWN, file_name
from keural.pretrained.stored_model import StoredNetwork, load_tokenizer, open_network
from keural.pretrained.weights import TensorInfo, Weights, data_bytes

HIDDEN = frozenset({"record", "checksum", "keural", "transformers", "tokenizer_sha256", "chat", "files"})
"""Keys of a record that are written anew."""


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
    adapter = open_adapter(path)
    stored = open_base(adapter, base)
    factors = adapter.factors(stored.config)
    digest = weights_digest(stored.weights.watched(advance))
    check_base(adapter, digest, stored.directory)
    if adapter.base_digest is None:
        say(f"{adapter.directory}: has no record that names its base, so whether {stored.directory} is it could not be verified")
    check_new(out, merged_weights(stored.weights, factors, dtype).nbytes)
    lineage = merged_lineage(adapter, stored, digest)
    return write_merged(out, stored, factors, dtype, lineage, advance)


def open_base(adapter: Adapter, base: Path | None) -> StoredNetwork:
    """The model that an adapter was trained on, verified. Raises `UserError` when it is not there, and as `open_network`."""
    if base is None and (adapter.stated_base is None or not Path(adapter.stated_base).exists()):
        where = f" ({adapter.stated_base} is not there)" if adapter.stated_base else ""
        raise UserError(f"{adapter.directory}: name the model that it was trained on with --base{where}")
    return open_network(base or Path(str(adapter.stated_base)))


def write_merged(
    out: Path,
    stored: StoredNetwork,
    factors: Mapping[str, Factors],
    dtype: torch.dtype,
    lineage: Mapping[str, Any],
    advance: Callable[[int], None] = lambda count: None,
) -> Path:
    """Write the model directory of a base with adapters in it."""
    tokenizer = load_tokenizer(stored.directory) if stored.has_tokenizer else None
    known = replace(stored, lineage=lineage)
    weights = merged_weights(stored.weights, factors, dtype).watched(advance)
    return write_model_directory(out, stored.config, weights, tokenizer, lineage, stored.chat, ends=known.ends)


def merged_lineage(adapter: Adapter, stored: StoredNetwork, digest: str) -> dict[str, Any]:
    """What is known of a merged model: what the adapter's record says, or that of its base and what is not known."""
    about = {"base": digest, "rank": adapter.rank, "alpha": adapter.alpha, "names": list(adapter.names), "merged": True}
    told = adapter.record or stored.lineage
    kept = {key: value for key, value in told.items() if key not in HIDDEN}
    if not adapter.record:
        kept["objectives"] = [*stored.lineage.get("objectives", [UNKNOWN]), UNKNOWN]
        kept["stage"] = file_name(adapter.directory.name)
    return {**kept, "adapter": about}
