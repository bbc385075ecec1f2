"""Parts `serve` and `engines`: the server's slots on the device, by graphs, then by one kernel after another and beside
transformers' continuous batching.

In: the network at its real shape with random weights. Out: tokens per second at 1, 8 and 32 streams, greedy and with the card's
settings, through the scheduler too; what the kernels of a step take; distances from the plain network.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor

from benchmarks.gpu_parts.bench import BF16, GIB, Bench, Size
from benchmarks.gpu_parts.check import middle
from keural.model import KeuralMoECausalLM
from keural.serve.batching.graphed_slots import GraphedSlots
from keural.serve.batching.requests import Event, Request
from keural.serve.batching.runner import Ticket
from keural.serve.batching.scheduler import Scheduler
from keural.serve.batching.slots import Row
from keural.serve.batching.transformers_slots import TransformersSlots
from keural.serve.engines.sampling import Sampler, choose
from keural.serve.engines.sampling_params import SamplingParams

CARD = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}


def serve(bench: Bench) -> None:
    """By graphs: right, then quick."""
    with bench.guarded("equal"):
        bench.record("equal", **distances(bench))
    torch.compiler.reset()  # a second model's sizes would be taken for sizes that change
    model = random_model(bench, bench.size)
    if bench.cuda:
        from benchmarks.gpu_parts.few_rows import products  # needs Triton

        with bench.guarded("products", 30):
            products(bench, model)
    length, answer, counts = spans(bench)
    begun = time.perf_counter()
    slots = GraphedSlots(model, counts[-1], length + answer if bench.small else None)
    slots.prepare()
    bench.record("graphs", first_s=round(time.perf_counter() - begun, 1), sizes=len(slots._steps), peak_gib=bench.peak())
    for streams in counts:
        with bench.guarded(f"graphed slots {streams}", 3):
            record_rates(bench, f"graphed slots {streams}", slots, streams, length, answer)
    for streams in counts:
        sampled(bench, slots, streams)
        scheduled(bench, slots, streams, answer)
    long_answers(bench, slots)
    profiled(bench, slots, counts)


def engines(bench: Bench) -> None:
    """The same without graphs, and by transformers' continuous batching."""
    model = random_model(bench, bench.size)
    length, answer, counts = spans(bench)
    for streams in reversed(counts):
        plain_slots(bench, model, streams, length, answer)
        continuous(bench, model, streams, length, answer)


def spans(bench: Bench) -> tuple[int, int, tuple[int, ...]]:
    """Tokens of a prompt and of an answer, and how many at once."""
    return (8, 4, (1, 4)) if bench.small else (128, 64, (1, 8, 32))


def random_model(bench: Bench, size: Size, dtype: torch.dtype = BF16) -> KeuralMoECausalLM:
    """Random weights, made on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype if bench.cuda else torch.float32)
    try:
        with torch.device(bench.device):
            return KeuralMoECausalLM(size.config).eval()
    finally:
        torch.set_default_dtype(before)


def distances(bench: Bench) -> dict[str, float | bool]:
    """Of the logits of rows of several lengths from those of the network in float64; graphs beside the plain slots."""
    size = middle(bench)
    model = random_model(bench, size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)  # so that experts and keys differ
    oracle = KeuralMoECausalLM(size.config).eval()
    oracle.load_state_dict(model.state_dict())
    oracle.double().set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(1)
    found: dict[str, list[Tensor]] = defaultdict(list)
    held = [3, 70, 20, 41, 5]
    longest = size.config.max_position_embeddings
    ids = [torch.randint(4, size.config.vocab_size, (longest,), generator=generator).tolist() for _ in held]
    kinds = {
        "graphs": GraphedSlots(model, 5, longest),
        "again": GraphedSlots(model, 5, longest),
        "plain": TransformersSlots(model, 5, longest),
    }
    for rows in ([0], [0, 1, 2, 3, 4], [3, 1], [4], [0, 2, 3]):
        new = [Row(row, ids[row][held[row] : held[row] + 1], held[row], True) for row in rows]
        for name, slots in kinds.items():
            for row in new:
                if slots.cut(row.slot, row.start) < row.start:
                    slots.cut(row.slot, 0)
                    slots.step([Row(row.slot, ids[row.slot][: row.start], 0, False)])
            found[name] += slots.step(new).float().cpu().unbind(0)
        with torch.inference_mode():
            found["oracle"] += [oracle(input_ids=torch.tensor([ids[row][: held[row] + 1]])).logits[0, -1] for row in rows]
        for row in rows:
            held[row] += 1
    stacked = {name: torch.stack(each).double() for name, each in found.items()}

    def distance(name: str) -> float:
        return float((stacked[name] - stacked["oracle"]).norm() / stacked["oracle"].norm())

    return {
        "graphs_to_float64": distance("graphs"),
        "plain_to_float64": distance("plain"),
        "graphs_to_plain": float((stacked["graphs"] - stacked["plain"]).norm() / stacked["plain"].norm()),
        "same_bits_twice": torch.equal(stacked["graphs"], stacked["again"]),
    }


def prompts_for(model: KeuralMoECausalLM, streams: int, length: int) -> list[list[int]]:
    """Random ones, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(4, model.config.vocab_size, (streams, length), generator=generator).tolist()


def seconds_of(slots: TransformersSlots, prompts: Sequence[list[int]], answer: int) -> tuple[float, float]:
    """Seconds of a second pass for all tokens, and for those after the first; greedy."""
    for _ in range(2):
        for slot in range(len(prompts)):
            slots.cut(slot, 0)
        begun = time.perf_counter()
        tokens = slots.step([Row(slot, prompt, 0, True) for slot, prompt in enumerate(prompts)]).argmax(-1).tolist()
        first = time.perf_counter()
        for held in range(len(prompts[0]), len(prompts[0]) + answer - 1):
            tokens = slots.step([Row(slot, [token], held, True) for slot, token in enumerate(tokens)]).argmax(-1).tolist()
        ended = time.perf_counter()
    return ended - begun, ended - first


def record_rates(bench: Bench, name: str, slots: TransformersSlots, streams: int, length: int, answer: int) -> None:
    """Of all tokens and of those after the first ones."""
    seconds, decoding = seconds_of(slots, prompts_for(slots.model, streams, length), answer)
    after = streams * (answer - 1) / decoding
    bench.record(
        name, tokens_per_s=round(streams * answer / seconds, 1), decoding_tokens_per_s=round(after, 1), peak_gib=bench.peak()
    )


def plain_slots(bench: Bench, model: KeuralMoECausalLM, streams: int, length: int, answer: int) -> None:
    """One kernel after another."""
    with bench.guarded(f"plain slots {streams}", 12):
        record_rates(bench, f"plain slots {streams}", TransformersSlots(model, streams, length + answer), streams, length, answer)
    for module in model.modules():
        module._forward_hooks.clear()  # those that count experts: the next side does without


def continuous(bench: Bench, model: KeuralMoECausalLM, streams: int, length: int, answer: int) -> None:
    """transformers' continuous batching; a second pass."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    name = f"continuous batching {streams}"
    with bench.guarded(name, 15):
        config = GenerationConfig(do_sample=False, max_new_tokens=answer, eos_token_id=-1, pad_token_id=0)
        cache = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64) if bench.small else None
        prompts = prompts_for(model, streams, length)
        for _ in range(2):
            begun = time.perf_counter()
            outputs = model.generate_batch(
                prompts, generation_config=config, continuous_batching_config=cache, progress_bar=False, warmup=False
            )
            seconds = time.perf_counter() - begun
            if [len(output.generated_tokens) for output in outputs.values()] != [answer] * len(prompts):
                raise ValueError("not all answers have their length")
        bench.record(name, tokens_per_s=round(streams * answer / seconds, 1), peak_gib=bench.peak())


def long_answers(bench: Bench, slots: GraphedSlots) -> None:
    """Steps that look at many keys."""
    length, streams = (8, 2) if bench.small else (3000, 8)
    with bench.guarded("long", 8):
        for slot in range(streams):
            slots.cut(slot, 0)
            slots.step([Row(slot, prompts_for(slots.model, 1, length)[0], 0, False)])
        found = {f"ms_{count}": round(step_ms(slots, count, length), 3) for count in (1, streams)}
        bench.record("long", held=length, **found)


def step_ms(slots: GraphedSlots, streams: int, held: int, times: int = 20) -> float:
    """Median milliseconds of a step, its logits waited for."""
    taken = []
    for _ in range(times):
        for slot in range(streams):
            slots.cut(slot, held)
        begun = time.perf_counter()
        slots.step([Row(slot, [5], held, True) for slot in range(streams)]).argmax(-1).tolist()
        taken.append(time.perf_counter() - begun)
    return 1e3 * median(taken)


def sampled(bench: Bench, slots: GraphedSlots, streams: int) -> None:
    """What choosing a token costs beside a step."""
    with bench.guarded(f"sampler {streams}", 3):
        size = slots.model.config.vocab_size
        logits = torch.randn(streams, size, device=bench.device)
        for name, settings in (("greedy_ms", {"temperature": 0.0}), ("card_ms", CARD)):
            samplers = [Sampler(SamplingParams(seed=seed, **settings), range(100), size) for seed in range(streams)]
            bench.record(f"sampler {streams}", **{name: round(clock_ms(lambda: choose(logits, samplers)), 3)})  # noqa: B023


def clock_ms(function: Callable[[], object], times: int = 20) -> float:
    """Median milliseconds by the clock of a call that waits for the device."""
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        function()
        taken.append(time.perf_counter() - begun)
    return 1e3 * median(taken[2:])


def scheduled(bench: Bench, slots: GraphedSlots, streams: int, answer: int) -> None:
    """Short prompts through the scheduler, so that decoding is what counts."""
    for name, settings in (("greedy", {"temperature": 0.0, "repetition_penalty": 1.0}), ("card", CARD)):
        with bench.guarded(f"scheduled {streams}", 5):
            done = threading.Semaphore(0)

            def deliver(events: Sequence[tuple[Ticket, Event]], done: threading.Semaphore = done) -> None:
                for _ticket, event in events:
                    if event.end is not None:
                        done.release()

            size = slots.model.config.vocab_size
            scheduler = Scheduler(slots, size, deliver, streams)
            scheduler.start()
            prompts = prompts_for(slots.model, streams, 4)
            for _ in range(2):
                begun = time.perf_counter()
                scheduler.submit(
                    [Request(prompt, SamplingParams(seed=0, max_new_tokens=answer, **settings), frozenset()) for prompt in prompts]
                )
                for _ in prompts:
                    done.acquire(timeout=60)
                seconds = time.perf_counter() - begun
            scheduler.close()
            bench.record(f"scheduled {streams}", **{f"{name}_tokens_per_s": round(streams * answer / seconds, 1)})


def profiled(bench: Bench, slots: GraphedSlots, counts: Sequence[int]) -> None:
    """What the kernels of a step take on the device, the longest first."""
    if not bench.cuda:
        return
    for streams in counts:
        with bench.guarded(f"profile {streams}", 5):
            for slot in range(streams):
                slots.cut(slot, 0)
                slots.step([Row(slot, [5] * 8, 0, False)])
            step_ms(slots, streams, 8, 3)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                step_ms(slots, streams, 8, 5)
            kernels = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
            total = sum(kernel.self_device_time_total for kernel in kernels) / 5e3
            longest = {
                kernel.key[:90]: [round(kernel.self_device_time_total / 5e3, 3), kernel.count // 5] for kernel in kernels[:16]
            }
            bench.record(
                f"profile {streams}",
                device_ms=round(total, 3),
                clock_ms=round(step_ms(slots, streams, 8), 3),
                kernels=sum(kernel.count for kernel in kernels) // 5,
                longest_ms_and_count=longest,
                weights_gib=round(sum(parameter.nbytes for parameter in slots.model.parameters()) / GIB, 2),
            )
