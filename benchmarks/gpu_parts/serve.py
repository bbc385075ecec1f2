"""Part `serve`: tokens per second of the server's slots, beside transformers' continuous batching, both greedy."""

import time

import torch

from benchmarks.gpu_parts.bench import BF16, Bench
from keural.model import KeuralMoECausalLM


def serve(bench: Bench) -> None:
    """The same prompts and lengths by the server's slots and by transformers' continuous batching."""
    size = bench.size
    before = torch.get_default_dtype()
    torch.set_default_dtype(BF16 if bench.cuda else torch.float32)
    try:
        with torch.device(bench.device):
            model = KeuralMoECausalLM(size.config).eval()
    finally:
        torch.set_default_dtype(before)
    length, answer = (8, 4) if bench.small else (128, 64)
    generator = torch.Generator().manual_seed(0)
    for streams in (1, 4) if bench.small else (1, 8, 32):
        prompts = torch.randint(4, size.config.vocab_size, (streams, length), generator=generator).tolist()
        with bench.guarded(f"slots_{streams}", 8):
            seconds, decoding = slots_seconds(model, prompts, answer)
            bench.record(
                f"slots_{streams}",
                tokens_per_s=round(streams * answer / seconds, 1),
                decoding_tokens_per_s=round(streams * (answer - 1) / decoding, 1),
                peak_gib=bench.peak(),
            )
        with bench.guarded(f"continuous_batching_{streams}", 15):
            seconds = continuous_seconds(bench, model, prompts, answer)
            bench.record(f"continuous_batching_{streams}", tokens_per_s=round(streams * answer / seconds, 1), peak_gib=bench.peak())


def slots_seconds(model: KeuralMoECausalLM, prompts: list[list[int]], answer: int) -> tuple[float, float]:
    """Seconds of a second pass for all tokens, and for those after the first."""
    from keural.serve.batching.slots import Row
    from keural.serve.batching.transformers_slots import TransformersSlots

    slots = TransformersSlots(model, len(prompts), len(prompts[0]) + answer)
    for _ in range(2):
        for slot in range(len(prompts)):
            slots.cut(slot, 0)
        begun = time.perf_counter()
        logits = slots.step([Row(slot, prompt, 0, True) for slot, prompt in enumerate(prompts)])
        tokens = logits.argmax(-1).tolist()
        first = time.perf_counter()
        for held in range(len(prompts[0]), len(prompts[0]) + answer - 1):
            tokens = slots.step([Row(slot, [token], held, True) for slot, token in enumerate(tokens)]).argmax(-1).tolist()
        ended = time.perf_counter()
    for module in model.modules():
        module._forward_hooks.clear()  # those that count experts: the next side does without
    return ended - begun, ended - first


def continuous_seconds(bench: Bench, model: KeuralMoECausalLM, prompts: list[list[int]], answer: int) -> float:
    """Seconds of a second pass."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    config = GenerationConfig(do_sample=False, max_new_tokens=answer, eos_token_id=-1, pad_token_id=0)
    cache = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64) if bench.small else None
    for _ in range(2):
        begun = time.perf_counter()
        outputs = model.generate_batch(
            prompts, generation_config=config, continuous_batching_config=cache, progress_bar=False, warmup=False
        )
        seconds = time.perf_counter() - begun
        if [len(output.generated_tokens) for output in outputs.values()] != [answer] * len(prompts):
            raise ValueError("not all answers have their length")
    return seconds
