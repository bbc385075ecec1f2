"""Tokens per second of `keural generate`'s engine on a CPU, beside transformers' Mixtral of the same shape in the same run.

    python benchmarks/generate_speed.py [--threads 2] [--rounds 5] [--shapes toy,100m] [--dtypes float32,bfloat16]

Ours is `TransformersEngine`, greedy, as chat uses it, from prompt ids to answer ids. The peer is `MixtralForCausalLM` with full
attention and random weights of the same shape, run by `model.generate` and by the shortest possible loop around the model, with
every experts implementation that works on a CPU. Prefill is the time to the first token, decode the time of the
tokens after it. Rounds alternate between all sides, so that a noisy machine hits them alike; medians are compared, and the ratio is
to the fastest peer of each column. FLOPs are not counted; only the ratio is claimed.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache, GenerationConfig, MixtralConfig, MixtralForCausalLM

from keural.model import KeuralConfig, KeuralMoECausalLM
from keural.pretrained.directory import save_model_directory
from keural.recipe import TokenizerSpec
from keural.serve.engines.sampling_params import SamplingParams
from keural.serve.engines.transformers import TransformersEngine
from keural.tokenizer import KeuralTokenizer
from keural.tokenizer.train import train_tokenizer

SHAPES: dict[str, dict[str, int]] = {
    "toy": {
        "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 32, "num_local_experts": 4, "sliding_window": 33,
    },
    "100m": {
        "hidden_size": 512, "intermediate_size": 704, "num_hidden_layers": 10, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 64, "num_local_experts": 8, "sliding_window": 129,
    },
}  # fmt: skip
CONTEXT = 1024
PROMPT, ANSWER = 192, 48
LOOP_EXPERTS = ("eager", "grouped_mm", "batched_mm")
GENERATE_EXPERTS = (
    "eager",
    "grouped_mm",
)  # a prompt takes batched_mm seconds, and generate reads it twice to tell the phases apart

Times = tuple[float, float]
"""Seconds to the first token, and for the others together."""
Side = Callable[[], Times]


def sides(name: str, dtype: torch.dtype, directory: Path, tokenizer: KeuralTokenizer) -> dict[str, Side]:
    """Everything that is timed: first ours, then the peers."""
    shape = dict(SHAPES[name]) | {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": CONTEXT}
    prompt = torch.randint(4, tokenizer.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    torch.manual_seed(0)
    ours = KeuralMoECausalLM(KeuralConfig(**shape, eos_token_id=2)).to(dtype)
    save_model_directory(directory / name, ours.config, ours.state_dict(), tokenizer, {})
    result: dict[str, Side] = {"keural": lambda: our_times(engine, prompt)}
    engine = TransformersEngine(directory / name, device="cpu")
    del shape["sliding_window"]
    for experts in LOOP_EXPERTS:
        config = MixtralConfig(**shape, tie_word_embeddings=True)
        config._experts_implementation = experts
        model = MixtralForCausalLM(config).to(dtype).eval()
        result[f"Mixtral {experts}, loop"] = lambda model=model: loop_times(model, prompt)  # type: ignore[misc]
        if experts in GENERATE_EXPERTS:
            result[f"Mixtral {experts}, generate"] = lambda model=model: generate_times(model, prompt)  # type: ignore[misc]
    return result


def our_times(engine: TransformersEngine, prompt: list[int]) -> Times:
    """Our engine with a cold cache."""
    engine._forget()
    stream = engine.stream(prompt, SamplingParams(temperature=0.0, repetition_penalty=1.0, max_new_tokens=ANSWER), set())
    return clocked(stream)


def loop_times(model: MixtralForCausalLM, prompt: list[int]) -> Times:
    """The shortest loop around Mixtral."""
    return clocked(greedy(model, prompt))


@torch.inference_mode()
def greedy(model: MixtralForCausalLM, prompt: list[int]) -> Iterator[int]:
    """Greedy tokens after a prompt."""
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([prompt])
    for _ in range(ANSWER):
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1].argmax(dim=-1, keepdim=True)
        yield int(ids)


def generate_times(model: MixtralForCausalLM, prompt: list[int]) -> Times:
    """transformers' own `generate`: once for one token, once for all."""
    ids = torch.tensor([prompt])

    def seconds(count: int) -> float:
        config = GenerationConfig(do_sample=False, min_new_tokens=count, max_new_tokens=count, pad_token_id=0)
        started = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return time.perf_counter() - started

    first = seconds(1)
    return first, seconds(ANSWER) - first


def clocked(stream: Iterator[int]) -> Times:
    """Time of the first item, and of the others."""
    started = time.perf_counter()
    next(stream)
    first = time.perf_counter()
    count = sum(1 for _ in stream)
    assert count == ANSWER - 1
    return first - started, time.perf_counter() - first


def rates(times: list[Times]) -> tuple[float, float]:
    """Median tokens per second of prefill and decode."""
    prefill, decode = (statistics.median(column) for column in zip(*times, strict=True))
    return PROMPT / prefill, (ANSWER - 1) / decode


def small_tokenizer(vocab_size: int, directory: Path) -> KeuralTokenizer:
    """A tokenizer of the wanted size on random words; what is in it does not matter here."""
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(ord("a"), ord("z") + 1, (4000, 9, 8), generator=generator).tolist()
    texts = [" ".join("".join(map(chr, word)) for word in line) for line in letters]
    spec = TokenizerSpec.model_validate({"vocab_size": vocab_size, "sources": [{"name": "words", "adapter": "text"}]})
    return train_tokenizer(iter(texts), spec, directory, seed=0)


def main() -> None:
    """Print one table per shape and precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--dtypes", default="float32,bfloat16")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"`python {' '.join(sys.argv)}` at {commit}; {versions}; {arguments.threads} threads")
    print(f"prompt {PROMPT} tokens, answer {ANSWER}, medians of {arguments.rounds} rounds")
    for name in arguments.shapes.split(","):
        for dtype in arguments.dtypes.split(","):
            with tempfile.TemporaryDirectory() as directory:
                tokenizer = small_tokenizer(900 if name == "toy" else 8192, Path(directory) / "tokenizer")
                measured = sides(name, getattr(torch, dtype), Path(directory), tokenizer)
                rounds = [{side: run() for side, run in measured.items()} for _ in range(arguments.rounds + 1)][1:]
            print_table(name, dtype, {side: rates([times[side] for times in rounds]) for side in measured})


def print_table(name: str, dtype: str, measured: dict[str, tuple[float, float]]) -> None:
    """One row per side; the ratio of ours to the best of the others stands in the last row."""
    print(f"\n| {name}, {dtype} | prefill, tokens/s | decode, tokens/s |\n|---|---|---|")
    for side, (prefill, decode) in measured.items():
        print(f"| {side} | {prefill:,.0f} | {decode:,.1f} |")
    ours = measured["keural"]
    best = [max(rate[column] for side, rate in measured.items() if side != "keural") for column in (0, 1)]
    print(f"| ours to the fastest | {ours[0] / best[0]:.2f} | {ours[1] / best[1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
