"""`keural export --format pt`: back to the checkpoint that the published scripts read.

In: a `StoredModel`. Out: a directory with `checkpoint_STEP.pt` (tensors under the published names, `model_config` in the published
convention) and the tokenizer under its published name. What the published training script also wants when it resumes, the state of
its optimizer, does not exist for an exported model.
"""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from keural.errors import UserError
from keural.files import atomic_directory, check_new, write_atomic
from keural.model import SHAPE, KeuralConfig
from keural.pretrained.lineage import write_record
from keural.pretrained.stored_model import StoredModel
from keural.pretrained.tensor_names import published_name
from keural.pretrained.weights import Weights, data_bytes

_CONFIG = (*SHAPE, "router_aux_loss_coef", "router_z_loss_coef", "max_position_embeddings")
"""Fields of the published `ModelConfig` that mean the same here; the window and theta are written apart."""
_FIXED = {"rms_norm_eps": 1e-5, "hidden_act": "silu"}
"""What the published code has as constants."""
_LOCAL_HEADER, _EXTRA_HEADER, _ZIP64_EXTRA = 30, 4, 20
"""Sizes of the parts of a zip record's header (PKWARE APPNOTE 4.3.7, 4.5.1 and 4.5.3)."""
_PADDING_ID = 0x4246
_ALIGNMENT = 64


def export_pt(model: StoredModel, out: Path, advance: Callable[[int], None] = lambda count: None) -> Path:
    """Write `model` as a published training checkpoint into the directory `out`; at most one tensor is in memory.

    Returns:
        The file.

    Raises:
        UserError: for a model that the published code cannot build, too little disk, or an `out` that is not empty.
    """
    model_config = published_config(model.config)
    check_new(out, model.weights.nbytes)
    source = model.lineage.get("source") or {}
    checkpoint: dict[str, Any] = {name: source.get(name) or 0 for name in ("step", "epoch", "tokens_processed")}
    with atomic_directory(out) as directory:
        file = directory / f"checkpoint_{checkpoint['step']}.pt"
        checkpoint |= {"model_config": model_config, "train_config": {}}
        _save(file, checkpoint, model.watched(advance).weights)
        write_atomic(directory / "keural_tokenizer.model", model.tokenizer.model_bytes)
        write_record(directory, {**model.lineage, "format": "pt"}, model.chat)
    return out / file.name


def published_config(config: KeuralConfig) -> dict[str, Any]:
    """`model_config` of the published checkpoint. Raises `UserError` for a model that the published code cannot build."""
    default = KeuralConfig(num_hidden_layers=config.num_hidden_layers).layer_types
    if config.layer_types != default or config.sliding_window is None:
        raise UserError(
            "the published code slides on even layers and only there; this model's layer_types cannot be exported as pt"
        )
    if config.rope_parameters["rope_type"] != "default":
        raise UserError("the published code has unscaled positions only; this model's rope_type cannot be exported as pt")
    for name, value in _FIXED.items():
        if getattr(config, name) != value:
            raise UserError(f"the published code has {name} {value}; this model's {getattr(config, name)} cannot be exported as pt")
    shape = {name: getattr(config, name) for name in _CONFIG}
    # The published code counts the keys before the token, not the token itself.
    return {**shape, "sliding_window": config.sliding_window - 1, "rope_theta": config.rope_parameters["rope_theta"]}


def _save(file: Path, checkpoint: Mapping[str, Any], weights: Weights) -> None:
    """What `torch.save({**checkpoint, "model": tensors})` writes, under the published names, with one tensor in memory at a time.

    torch.save lays the file out with empty records, which take no space; the archive is then copied with the values put in, so that
    every record has its checksum.
    """
    with FakeTensorMode():
        tensors = {published_name(name): torch.empty(info.shape, dtype=info.dtype) for name, info in weights.infos.items()}
    layout = file.with_suffix(".layout")
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save({**checkpoint, "model": tensors}, layout)
    values = iter(weights)
    with zipfile.ZipFile(layout) as empty, zipfile.ZipFile(file, "w") as archive:
        for record in empty.infolist():
            with archive.open(_aligned(archive, record.filename), "w", force_zip64=True) as target:
                if _is_storage(record.filename):
                    data = data_bytes(next(values)[1])
                    assert data.nbytes == record.file_size, f"{record.filename}: another size than laid out"
                    target.write(data)
                else:
                    target.write(empty.read(record))
    layout.unlink()


def _is_storage(record: str) -> bool:
    return record.split("/")[-2] == "data"


def _aligned(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """A record whose values begin at a multiple of 64 bytes, filled up the way PyTorch does, for `torch.load(mmap=True)`."""
    info = zipfile.ZipInfo(name)
    assert archive.fp is not None
    start = archive.fp.tell() + _LOCAL_HEADER + len(name.encode()) + _ZIP64_EXTRA + _EXTRA_HEADER
    padding = -start % _ALIGNMENT
    info.extra = _PADDING_ID.to_bytes(2, "little") + padding.to_bytes(2, "little") + bytes(padding)
    return info
