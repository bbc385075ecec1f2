"""The published shard writer, written again from the description of its files and of its packing rule, its defects included."""

import json
from pathlib import Path
from struct import pack

BOS, EOS = 1, 2


def pack_documents(documents: list[list[int]], length: int = 4096, limit: int = 5000) -> list[list[int]]:
    """Sequences of `length`: greedy, each document `[BOS] ids [EOS]`, cut where it does not fit."""
    sequences: list[list[int]] = []
    buffer: list[int] = []

    def flush() -> None:
        whole = buffer if len(buffer) <= length else [*buffer[: length - 1], EOS]
        sequences.append(whole + [0] * (length - len(whole)))
        buffer.clear()

    for ids in documents:
        document = [BOS, *ids, EOS]
        if len(document) > limit:
            document = [*document[: limit - 1], EOS]
        if buffer and len(buffer) + len(document) > limit:
            flush()
        buffer += document
    if buffer:
        flush()
    return sequences


def write_shard(directory: Path, number: int, sequences: list[list[int]], length: int = 4096) -> Path:
    """32 bytes are reserved for the header; 36 are written, over the first token."""
    directory.mkdir(parents=True, exist_ok=True)
    stem = directory / f"keural_{number:03d}"
    index = pack("<II", len(sequences), length)
    with stem.with_suffix(".bin").open("wb") as file:
        file.write(b"\0" * 32)
        for sequence in sequences:
            index += pack("<QI", file.tell(), len(sequence))
            file.write(pack(f"<{len(sequence)}I", *sequence))
        size = file.tell()
        file.seek(0)
        file.write(pack("<8sIQQ", b"KEURAL\0\0", 1, len(sequences), length) + pack("<Q", 0))
    stem.with_suffix(".idx").write_bytes(index)
    meta = {"num_sequences": len(sequences), "seq_length": length, "dtype": "uint32", "file_size_bytes": size}
    stem.with_suffix(".meta").write_text(json.dumps(meta))
    return stem.with_suffix(".bin")
