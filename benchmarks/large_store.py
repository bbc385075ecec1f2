"""Opening, reading and resuming a token store of the published corpus's size, without its data.

    python benchmarks/large_store.py [--tokens 70e9] [--documents 100e6] [--length 4096] [--rows 64] [--steps 200]

The token files are sparse (they take no space on disk, every token is 0), the document index is real and drawn at random: 8 bytes
per document on disk. A fresh process opens the store, makes batches at random steps of several epochs, and is started again to
make the last one of them. Its resident size counts the pages of the files that it has mapped. The index was just written, so it is
in the system's cache; the tokens are not.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from keural.data.loading.batch import Batch
from keural.data.loading.stream import Stream
from keural.data.tokens.store import END, FORMAT, SHARD_TOKENS, TOKEN, VERSION, TokenStore, content_fingerprint
from keural.files import CHECKSUM, fingerprint, write_json


def write_sparse_store(directory: Path, tokens: int, documents: int, shard_tokens: int = SHARD_TOKENS) -> None:
    """A store of documents with a real index and a manifest, and token files that are one hole."""
    generator = np.random.default_rng(0)
    directory.mkdir(parents=True)
    shards, files = [], {}
    starts = range(0, tokens, shard_tokens)
    for number, start in enumerate(starts):
        size = min(shard_tokens, tokens - start)
        count = max(1, min(size, documents // len(starts) + (number < documents % len(starts))))
        ends = np.unique(np.append(generator.integers(1, size, count - 1), size)).astype(END)
        while ends.size < count:  # some were drawn twice
            ends = np.unique(np.append(generator.integers(1, size, count - ends.size), ends)).astype(END)
        name = f"{number:05d}"
        with (directory / f"{name}.ds").open("wb") as file:
            file.truncate(size * TOKEN.itemsize)
        ends.tofile(directory / f"{name}.ds.index")
        longest = int(np.diff(ends.astype(np.int64), prepend=0).max())
        shards.append({"name": name, "tokens": size, "sequences": count, "trained": 0, "longest": longest})
        for path in (directory / f"{name}.ds", directory / f"{name}.ds.index"):
            files[path.name] = {"bytes": path.stat().st_size, "sha256": f"{number:064d}"}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "kind": "documents",
        "num_sequences": sum(shard["sequences"] for shard in shards),
        "num_tokens": tokens,
        "num_trained": None,
        "longest": max(shard["longest"] for shard in shards),
        "vocab_size": 131_074,
        "tokenizer_sha256": "0" * 64,
        "shards": shards,
        "files": files,
    }
    manifest["fingerprint"] = content_fingerprint(manifest)
    write_json(directory / "manifest.json", manifest | {CHECKSUM: fingerprint(manifest)})


def resident() -> int:
    """Resident bytes of this process, touched pages of mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def digest(batch: Batch) -> int:
    """A number that says what a batch is made of."""
    return hash((batch.sequence_ids.tobytes(), batch.position_ids.tobytes(), batch.segment_ids.tobytes())) & 0xFFFFFFFF


def measure(directory: Path, length: int, rows: int, steps: list[int]) -> dict[str, float | list[int]]:
    """What a fresh process needs."""
    before, started = resident(), time.perf_counter()
    stream = Stream(TokenStore.open(directory, verify="size"), "next_token", length, batch_rows=rows, seed=1)
    first = stream.batch(steps[0])
    opened = time.perf_counter() - started
    times = []
    for step in steps:
        started = time.perf_counter()
        stream.batch(step)
        times.append(time.perf_counter() - started)
    return {
        "open and first batch": opened,
        "median": statistics.median(times),
        "slowest": max(times),
        "resident growth": resident() - before,
        "digests": [digest(first), digest(stream.batch(steps[-1]))],
    }


def fresh(directory: Path, length: int, rows: int, steps: list[int]) -> dict[str, float | list[int]]:
    """`measure` in a process of its own."""
    arguments = [sys.executable, __file__, "--measure", str(directory), "--length", str(length), "--rows", str(rows)]
    command = [*arguments, "--at", ",".join(map(str, steps))]
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": "0"})
    return dict(json.loads(found.stdout))


def same_for_ranks(directory: Path, length: int, rows: int, steps: list[int]) -> bool:
    """Whether the shares of 2, 3, 8 and 64 ranks are together the whole batch."""
    stream = Stream(TokenStore.open(directory, verify="size"), "next_token", length, batch_rows=rows, seed=1)
    for step in steps:
        whole = stream.batch(step)
        for world in (2, 3, 8, 64):
            shares = [stream.batch(step, rank, world).sequence_ids for rank in range(world)]
            together = np.stack(shares, axis=1).reshape(-1, length)
            if not np.array_equal(together[: len(whole.sequence_ids)], whole.sequence_ids):
                return False
    return True


def main() -> None:
    """Print the figures of one size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=float, default=70e9)
    parser.add_argument("--documents", type=float, default=100e6)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--at", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        steps = [int(step) for step in arguments.at.split(",")]
        print(json.dumps(measure(arguments.measure, arguments.length, arguments.rows, steps)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "store"
        write_sparse_store(directory, int(arguments.tokens), int(arguments.documents))
        epochs = 3 * int(arguments.tokens) // (arguments.length * arguments.rows)
        steps = np.random.default_rng(1).integers(0, epochs, arguments.steps).tolist()
        found = fresh(directory, arguments.length, arguments.rows, steps)
        resumed = fresh(directory, arguments.length, arguments.rows, steps[-1:])
        on_disk = sum(path.stat().st_blocks * 512 for path in directory.iterdir())
        agree = same_for_ranks(directory, arguments.length, arguments.rows, steps[:10])
    print(f"{arguments.tokens:,.0f} tokens, {arguments.documents:,.0f} documents, {on_disk / 1e9:.2f} GB on disk;")
    print(f"batches of {arguments.rows} rows of {arguments.length}, {arguments.steps} random steps of 3 epochs\n")
    print("| what | figure |\n|---|---|")
    print(f"| opening, with the first batch | {1000 * found['open and first batch']:.0f} ms |")
    print(f"| batch(step), median | {1000 * found['median']:.1f} ms |")
    print(f"| batch(step), slowest | {1000 * found['slowest']:.1f} ms |")
    print(f"| growth of the resident size over all steps | {found['resident growth'] / 1e6:.0f} MB |")
    print(f"| resuming: a fresh process opens and makes that step | {1000 * resumed['open and first batch']:.0f} ms |")
    print(f"| … the same batch | {'yes' if resumed['digests'][0] == found['digests'][1] else 'NO'} |")
    print(f"| ranks 2, 3, 8, 64 together the same batch | {'yes' if agree else 'NO'} |")


if __name__ == "__main__":
    main()
