"""Tokens per second from a JSONL file into a token store, beside two peers on the same text in the same run.

    python benchmarks/bulk_tokenising.py TEXT_DIR TOKENIZER [--rounds 5] [--megabytes 40]

TEXT_DIR holds any .txt, .md and .po files; they are cut into documents of about 4 kB and written to one JSONL file. Ours is all of
`prepare`: reading, adapters, duplicate and held-out digests, SentencePiece, the store builder, the shuffle, checksums. Peers:

- the plain loop: one process, `json.loads`, `SentencePieceProcessor.encode` document by document, ids written to a file;
- `tokenizers`: the same model as tokenizer.json, `encode_batch_fast` on lists of 1,000 documents, which uses all cores.

Rounds alternate between the three, medians are compared. Tokens per processor second say what a busy machine hides. A token is
what ours writes, markers left out.
"""

import argparse
import array
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer

from keural.data.prepare import prepare
from keural.data.tokenizer_texts import pieces
from keural.recipe import DataSpec, SourceSpec
from keural.tokenizer import KeuralTokenizer

DOCUMENT_BYTES = 4096


def write_corpus(texts: Path, path: Path, megabytes: float) -> None:
    """One document a line, until `megabytes` are there."""
    size = 0
    with path.open("w", encoding="utf-8") as file:
        for source in sorted(found for found in texts.rglob("*") if found.suffix in {".txt", ".md", ".po"}):
            for piece in pieces(source.read_text(encoding="utf-8", errors="ignore"), DOCUMENT_BYTES):
                if piece.strip() and size < megabytes * 1e6:
                    file.write(json.dumps({"text": piece}, ensure_ascii=False) + "\n")
                    size += len(piece.encode("utf-8"))


def documents(path: Path) -> Iterator[str]:
    """The texts of a JSONL file."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def plain_loop(corpus: Path, model: Path, out: Path) -> int:
    """One process, one document at a time."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    count = 0
    with (out / "plain.bin").open("wb") as file:
        for text in documents(corpus):
            ids = processor.encode(text)
            array.array("I", ids).tofile(file)
            count += len(ids)
    return count


def with_tokenizers(corpus: Path, tokenizer: Tokenizer, out: Path) -> int:
    """Lists of documents on all cores."""
    count, waiting = 0, list(documents(corpus))
    with (out / "tokenizers.bin").open("wb") as file:
        for start in range(0, len(waiting), 1000):
            for encoding in tokenizer.encode_batch_fast(waiting[start : start + 1000], add_special_tokens=False):
                array.array("I", encoding.ids).tofile(file)
                count += len(encoding.ids)
    return count


def ours(corpus: Path, tokenizer: KeuralTokenizer, out: Path) -> int:
    """The package's own path, into a fresh directory."""
    source = SourceSpec(name="corpus", adapter="text", path=str(corpus))
    spec = DataSpec(sequence_length=4096, sources=[source], heldout_per_mille=0)
    with tempfile.TemporaryDirectory(dir=out) as directory:
        (row,) = prepare(spec, "next_token", None, tokenizer, Path(directory), seed=0).table
    return row.tokens - 2 * row.kept


def timed(function: Callable[[], int]) -> tuple[float, int, float]:
    """Wall-clock seconds, tokens and processor seconds (all threads) of one call."""
    started, used = time.perf_counter(), time.process_time()
    count = function()
    return time.perf_counter() - started, count, time.process_time() - used


def main() -> None:
    """Print one line per side, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=40)
    arguments = parser.parse_args()
    tokenizer = KeuralTokenizer.load(arguments.tokenizer)
    with tempfile.TemporaryDirectory() as directory:
        out, corpus = Path(directory), Path(directory) / "corpus.jsonl"
        write_corpus(arguments.texts, corpus, arguments.megabytes)
        tokenizer.save(out / "tokenizer")
        converted = Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json"))
        print(f"{corpus.stat().st_size / 1e6:.1f} MB, {sum(1 for _ in documents(corpus)):,} documents, {os.cpu_count()} cores\n")
        sides = {
            "keural data prepare": lambda: ours(corpus, tokenizer, out),
            "plain SentencePiece loop": lambda: plain_loop(corpus, out / "tokenizer" / "tokenizer.model", out),
            "tokenizers": lambda: with_tokenizers(corpus, converted, out),
        }
        rounds = [{name: timed(side) for name, side in sides.items()} for _ in range(arguments.rounds)]
    rates = {name: statistics.median(one[name][1] / one[name][0] for one in rounds) for name in sides}
    print("| side | tokens | tokens/s, median | lowest | highest | ours ÷ it | tokens per processor second |")
    print("|---|---|---|---|---|---|---|")
    for name, rate in rates.items():
        speeds = [one[name][1] / one[name][0] for one in rounds]
        ratio = rates["keural data prepare"] / rate
        work = statistics.median(one[name][1] / one[name][2] for one in rounds)
        cells = (rounds[0][name][1], rate, min(speeds), max(speeds))
        print(f"| {name} | {' | '.join(f'{cell:,.0f}' for cell in cells)} | {ratio:.2f} | {work:,.0f} |")
    print(f"\nlargest resident size {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
