"""What a reduced precision costs: the next-token distributions of GGUF files beside those of the model they were made from.

    python benchmarks/quantization_quality.py MODEL_DIR STORE [--positions 8000]

MODEL_DIR is a trained model, STORE a token store that it was not trained on (a stage's `heldout`). For every position of the
store's first sequences the file's distribution q, run by llama.cpp, is compared with the model's own p in float32, run by
transformers:

- mean and 99th percentile of KL(p || q) = Σ p (ln p - ln q), in nats;
- top-1 agreement: how often both put the same token first;
- perplexity of the store's own tokens under q, and its ratio to that under p.
"""

import argparse
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp
import torch
from torch import Tensor

from keural.convert.export import ExportOptions, export
from keural.data.tokens.store import TokenStore
from keural.pretrained.stored_model import load_model

QUANTIZATIONS = ("f32", "f16", "q8_0", "q4_k_m")


def sequences(store: TokenStore, positions: int, context: int) -> list[list[int]]:
    """Sequences of at least two tokens, cut to the context, until they hold so many positions."""
    chosen: list[list[int]] = []
    for index in range(len(store.lengths())):
        ids = store.sequence(index)[:context].tolist()
        if len(ids) > 1:
            chosen.append(ids)
        if sum(map(len, chosen)) >= positions:
            break
    return chosen


def opened(file: Path, context: int) -> Any:
    """llama.cpp with logits of every position, and its defaults for the file otherwise."""
    return llama_cpp.Llama(str(file), n_ctx=context, logits_all=True, verbose=False, swa_full=True)


def distributions(llama: Any, texts: list[list[int]]) -> Iterator[Tensor]:
    """Log-probabilities `[T, V]` of each text."""
    for ids in texts:
        llama.reset()
        llama.eval(ids)
        yield torch.from_numpy(llama.scores[: len(ids)].copy()).log_softmax(-1)


def compared(texts: list[list[int]], own: list[Tensor], theirs: Iterator[Tensor]) -> tuple[float, float, float, float]:
    """Mean KL, its 99th percentile, top-1 agreement, and the ratio of perplexities."""
    divergences, agreements, own_loss, their_loss = [], [], [], []
    for ids, p, q in zip(texts, own, theirs, strict=True):
        divergences.append((p.exp() * (p - q)).sum(-1))
        agreements.append(p.argmax(-1) == q.argmax(-1))
        targets = torch.tensor(ids[1:])[:, None]
        own_loss.append(-p[:-1].gather(-1, targets))
        their_loss.append(-q[:-1].gather(-1, targets))
    divergence = torch.cat(divergences)
    ratio = (torch.cat(their_loss).mean() - torch.cat(own_loss).mean()).exp()
    return float(divergence.mean()), float(divergence.quantile(0.99)), float(torch.cat(agreements).float().mean()), float(ratio)


def main() -> None:
    """Export, run and compare; prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument("--positions", type=int, default=8000)
    options = parser.parse_args()
    model = load_model(options.model)
    context = model.config.max_position_embeddings
    texts = sequences(TokenStore.open(options.store), options.positions, context)
    with torch.inference_mode():
        own = [model(torch.tensor([ids])).logits[0].log_softmax(-1) for ids in texts]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    print(
        f"commit {commit}, torch {version('torch')}, llama-cpp-python {version('llama-cpp-python')}; "
        f"{sum(map(len, texts)):,} positions\n"
    )
    print("| file | MB | mean KL, nats | 99th percentile | top-1 agreement | perplexity ratio |\n|---|---|---|---|---|---|")
    for quantize in QUANTIZATIONS:
        with tempfile.TemporaryDirectory() as scratch:
            file = export(options.model, Path(scratch) / "out", "gguf", ExportOptions(quantize=quantize))
            mean, high, agreement, ratio = compared(texts, own, distributions(opened(file, context), texts))
            size = file.stat().st_size / 1e6
        print(f"| {quantize} | {size:.2f} | {mean:.2e} | {high:.2e} | {agreement:.4f} | {ratio:.4f} |")


if __name__ == "__main__":
    main()
