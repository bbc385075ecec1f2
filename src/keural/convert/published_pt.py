"""`keural export --format pt`: back to the checkpoint that the published scripts read.

In: a `StoredNetwork`. Out: a directory with `checkpoint_STEP.pt` (tensors under the published names, `model_config` in the
published convention) and, where the model has one, the tokenizer under its published name: the format itself knows none. What the
published training script also wants when it resumes, the state of its optimizer, does not exist for an exported model.
"""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from keural.convert.carried import carried
from keural.files import atomic_directory, check_new, write_atomic
from keural.model import KeuralConfig
from keural.pretrained.lineage import write_record
from keural.pretrained.stored_model import StoredNetwork
from keural.pretrained.tensor_names import published_name
from keural.pretrained.weights import Weights, data_bytes

_LOCAL_HEADER, _EXTRA_HEADER, _ZIP64_EXTRA = 30, 4, 20
"""Sizes of the parts of a zip record's header (PKWARE APPNOTE 4.3.7, 4.5.1 and 4.5.3)."""
_PADDING_ID = 0x4246
_ALIGNMENT = 64


def export_pt(
    model: StoredNetwork, tokenizer: bytes | None, out: Path, advance: Callable[[int], None] = lambda count: None
) -> Path:
    """Write `model` as a published training checkpoint into the directory `out`; at most one tensor is in memory.

    Args:
        model: what to write.
        tokenizer: its SentencePiece model; None where it has none.
        out: must not exist, or be empty.
        advance: told the bytes of every tensor that was read.

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
        _save(file, checkpoint, model.weights.watched(advance))
        if tokenizer is not None:
            write_atomic(directory / "keural_tokenizer.model", tokenizer)
        write_record(directory, {**model.lineage, "format": "pt"}, model.chat)
    return out / file.name


def published_config(config: KeuralConfig) -> dict[str, Any]:
    """`model_config` of the published checkpoint. Raises `UserError` for a model that the published code cannot build."""
    return carried(config, "pt")


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
