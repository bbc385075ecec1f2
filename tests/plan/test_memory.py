"""Planned memory against what GPUs took, what the real sharding holds, and what real steps on a CPU take at their height."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

import keural.train.losses
import keural.train.network.head
from keural.model import KeuralConfig, KeuralMoECausalLM
from keural.recipe import ModelSpec, TrainSpec
from keural.train.memory.activations import Mix, Way, head_work, kept, routing
from keural.train.memory.network import Network
from keural.train.memory.parts import Layout, memory
from keural.train.micro_batches import MicroBatch, PairIndices
from keural.train.network.engine import Engine
from keural.train.network.head import piece_size
from keural.train.network.policy import Policy
from keural.train.optimization.optimizer import stored_in_halves
from keural.train.processes.modes import padded, positions_of_a_piece
from keural.train.processes.parallel import prepare_layers, shard
from keural.train.processes.ranks import Ranks
from tests.train.test_sharding import held

GIB, MIB = 2**30, 2**20
REAL = Network(ModelSpec(), 131_074)
SCALED: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 352, "num_local_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 32, "sliding_window": 33, "max_position_embeddings": 256,
}  # fmt: skip
"""The published widths divided by 16: with tokens and vocabulary divided by 16, too, each large tensor is 1/256 of the real one."""
VOCABULARY, TOKENS, ROW = 8194, 1024, 256


def mixed(way: Way, mix: Mix) -> Way:
    return replace(way, mix=mix)


def engine_way(recompute: str, compiled: bool, tokens: int) -> Way:
    return Way(engine=True, compiled=compiled, recompute=recompute, itemsize=2, converted=False, tokens=tokens)


@pytest.mark.parametrize(
    ("layers", "recompute", "compiled", "tokens", "precision", "measured"),
    [
        (24, "selective", True, 8192, "split-host", 75.74),
        (24, "full", True, 16_384, "split-host", 64.09),
        (24, "selective", True, 8192, "split", 131.43),
        (4, "selective", True, 16_384, "split-host", 21.71),
        (4, "selective", True, 8192, "split-host", 18.80),
        (4, "full", True, 16_384, "split-host", 17.2),
        (4, "none", True, 16_384, "split-host", 24.2),
        (4, "none", False, 16_384, "split-host", 30.9),
        (4, "full", False, 16_384, "split-host", 23.9),
    ],
)
def test_peaks_of_the_engine_are_those_that_gpus_had(
    layers: int,
    recompute: str,
    compiled: bool,
    tokens: int,
    precision: str,
    measured: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`benchmarks/gpu_h100_2026-11-26.md` and `gpu_h200_2026-11-26.md`; four layers were run without an optimizer. The head then
    made a piece of logits while the last one was still there.
    """
    network = Network(ModelSpec(num_hidden_layers=layers), 131_074)
    second = 2 * padded(131_074) * min(4096, tokens - 4096)
    monkeypatch.setattr("keural.train.memory.parts.head_work", lambda network, way: head_work(network, way) + second)

    planned = memory(network, Layout(1, precision, engine_way(recompute, compiled, tokens)))

    assert (planned.total - planned.parts["slack"]) / GIB == pytest.approx(measured, rel=0.01)


def test_the_head_has_one_piece_of_logits() -> None:
    """A longer micro-batch has hidden states, norms and routing more, and no logits."""
    more, less = (head_work(REAL, engine_way("full", True, tokens)) for tokens in (16_384, 8192))
    hidden = REAL.model.hidden_size
    assert more - less == 8192 * (2 * 2 * hidden + 2 * 4 * hidden) + (more_routing(16_384) - more_routing(8192))
    shorter = head_work(REAL, engine_way("full", True, 128))
    assert less - shorter - (more_routing(8192) - more_routing(128)) - (8192 - 128) * 12 * hidden == 2 * padded(131_074) * (
        4096 - 128
    )


def more_routing(tokens: int) -> int:
    return routing(REAL, engine_way("full", True, tokens))


def test_a_mixture_of_modes_lies_between_them() -> None:
    """9 of 24 layers selective, the first ones, took 74.2 GiB on an H100; the other way round is planned to take 1 GiB less."""
    full, selective = (engine_way(mode, True, 16_384) for mode in ("full", "selective"))
    base = memory(REAL, Layout(1, "split-host", full))
    more = kept(REAL, selective, "selective") - kept(REAL, full, "full")
    other = memory(REAL, Layout(1, "split-host", mixed(engine_way("budget", True, 16_384), Mix(full=15, selective=9))))

    assert (base.total - base.parts["slack"] + 9 * more) / GIB == pytest.approx(74.24, rel=0.01)
    assert (other.total - other.parts["slack"]) / GIB == pytest.approx(73.2, rel=0.01)


def test_the_models_own_layers_with_bfloat16_weights_take_what_they_took() -> None:
    """Four layers, 16,384 tokens: 17.2 GiB on an H200, weights and gradients in bfloat16."""
    network = Network(ModelSpec(num_hidden_layers=4), 131_074)
    way = Way(engine=False, compiled=False, recompute="full", itemsize=2, converted=False, tokens=16_384)

    planned = memory(network, Layout(1, "split-host", way))

    assert (planned.total - planned.parts["slack"]) / GIB == pytest.approx(17.2, rel=0.02)


@pytest.mark.parametrize("world", [2, 64, pytest.param(1024, marks=pytest.mark.slow)])
def test_a_rank_holds_what_is_planned(world: int) -> None:
    assert REAL.held(world) == held(0, world)
    assert REAL.held(1) == 14_832_054_272


@pytest.mark.parametrize("vocabulary", [514, 8194, 131_074])
def test_pieces_of_the_head_are_those_of_the_trainer(vocabulary: int) -> None:
    assert positions_of_a_piece(vocabulary, 2) == piece_size(vocabulary, torch.bfloat16, torch.device("cuda"))


# real steps -------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The head as an accelerator has it, at 1/256: pieces of 256 positions, worked on in place; and one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(keural.train.losses, "LOGITS_PER_CHUNK", 2**15)
    monkeypatch.setattr(keural.train.network.head, "piece_size", lambda *arguments: 256)
    monkeypatch.setattr(keural.train.network.head, "logprobs_and_gradient", lambda logits, labels, *rest: torch.zeros(len(labels)))
    yield
    torch.set_num_threads(threads)


@contextmanager
def group(world: int) -> Iterator[Ranks]:
    if world > 1:
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield Ranks(0, world, torch.device("cpu"))
    finally:
        if world > 1:
            dist.destroy_process_group()


def peak(shape: dict[str, Any], layers: int, way: Way, world: int, precision: str = "fp32") -> float:
    """MiB of weights, gradients and everything else at the height of a second micro-batch's forward and backward pass."""
    config = KeuralConfig(**(SCALED | {"vocab_size": VOCABULARY} | shape), num_hidden_layers=layers)
    config._experts_implementation = "grouped_mm"
    with group(world) as ranks:
        policy = open_policy(KeuralMoECausalLM(config), way, ranks, precision)
        micro = random_micro(way.tokens, config.vocab_size)
        step(policy, micro)
        tracker = MemTracker()
        tracker.track_external(policy)
        with tracker:
            step(policy, micro)
        found: float = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] / MIB
        return found


def open_policy(model: KeuralMoECausalLM, way: Way, ranks: Ranks, precision: str) -> Policy:
    recompute = "none" if way.mix is not None else way.recompute
    spec = TrainSpec.model_validate({
        "steps": 1, "batch_tokens": way.tokens, "lr": 1e-3, "compute_dtype": "bfloat16", "recompute": recompute,
        "expert_parallel": way.expert_parallel,
    })  # fmt: skip
    engine = Engine(torch.bfloat16, way.modes(model.config.num_hidden_layers), False, "masked", "grouped_mm", True)
    if way.engine and ranks.world > 1:
        policy = Policy(model, torch.bfloat16, engine).train()
        for parameter in stored_in_halves(model).values() if precision == "split" else ():
            parameter.data = parameter.data.bfloat16()
        shard(policy, model, spec, ranks)
        return policy
    if way.engine:
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and not name.endswith("gate.weight"):
                parameter.data = parameter.data.bfloat16()
        return Policy(model, torch.bfloat16, engine).train()
    policy = Policy(model, torch.bfloat16).train()
    prepare_layers(model, spec)
    shard(policy, model, spec, ranks)
    return policy


def random_micro(tokens: int, vocabulary: int) -> MicroBatch:
    ids = torch.randint(4, vocabulary, (tokens // ROW, ROW), generator=torch.Generator().manual_seed(0))
    positions = np.tile(np.arange(ROW), (tokens // ROW, 1))
    pairs = PairIndices(np.zeros((2, 0), int), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    return MicroBatch(ids, torch.from_numpy(positions), ids.clone(), torch.ones_like(ids, dtype=torch.bool), positions, pairs)


def step(policy: Policy, micro: MicroBatch) -> None:
    output = policy(micro)
    routed = torch.stack(output.router_logits).float().logsumexp(-1).square().mean()
    (-output.logprobs.mean() + 1e-3 * routed).backward()


def planned_peak(shape: dict[str, Any], layers: int, way: Way, world: int, precision: str = "fp32") -> float:
    """MiB that are planned for the same: without moments, which the step above has none of."""
    model = {name: value for name, value in (SCALED | shape).items() if name != "vocab_size"}
    network = Network(ModelSpec(**model, num_hidden_layers=layers), shape.get("vocab_size", VOCABULARY))
    found = memory(network, Layout(world, "split-host" if way.engine and world == 1 else precision, way))
    return (found.total - sum(found.parts[name] for name in ("slack", "moments", "master"))) / MIB


SHAPES: list[dict[str, Any]] = [
    {},
    {"vocab_size": 514, "intermediate_size": 704},
    {"vocab_size": 514, "num_experts_per_tok": 4},
    {"vocab_size": 514, "hidden_size": 512},
    {"vocab_size": 514, "num_attention_heads": 16},
]


@pytest.mark.parametrize(
    ("shape", "layers", "world", "recompute", "tokens"),
    [
        pytest.param({}, 4, 2, "full", TOKENS, marks=pytest.mark.slow),
        pytest.param({}, 2, 16, "none", TOKENS // 2, marks=pytest.mark.slow),
        *(
            pytest.param(shape, layers, world, recompute, tokens, marks=pytest.mark.slow)
            for shape in SHAPES
            for layers, world, recompute, tokens in [(2, 8, "full", 512), (4, 2, "full", 2048), (4, 64, "none", 1024)]
        ),
    ],
)
def test_peaks_of_sharded_steps_are_as_planned(shape: dict[str, Any], layers: int, world: int, recompute: str, tokens: int) -> None:
    way = Way(engine=False, compiled=False, recompute=recompute, itemsize=2, converted=False, tokens=tokens)

    assert planned_peak(shape, layers, way, world) == pytest.approx(peak(shape, layers, way, world), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "split"])
@pytest.mark.parametrize(
    ("layers", "world", "recompute", "tokens"),
    [(4, 2, "selective", 1024), (4, 8, "selective", 512), (4, 64, "selective", 1024), (4, 2, "full", 2048), (2, 16, "none", 512)],
)
def test_peaks_of_the_sharded_engine_are_as_planned(layers: int, world: int, recompute: str, tokens: int, precision: str) -> None:
    way = engine_way(recompute, False, tokens)

    assert planned_peak({}, layers, way, world, precision) == pytest.approx(peak({}, layers, way, world, precision), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "world", "number", "recompute", "tokens"),
    [(4, 2, 2, "selective", 1024), (4, 8, 4, "selective", 512), (4, 64, 8, "selective", 1024), (4, 4, 2, "full", 2048),
     (2, 16, 8, "none", 512)],
)  # fmt: skip
def test_peaks_with_divided_experts_are_as_planned(layers: int, world: int, number: int, recompute: str, tokens: int) -> None:
    """Nothing comes in that was not sent: the experts are used evenly."""
    way = replace(engine_way(recompute, False, tokens), expert_parallel=number)

    assert planned_peak({}, layers, way, world) == pytest.approx(peak({}, layers, way, world), rel=0.05)


SLOW = [pytest.param(recompute, marks=pytest.mark.slow) for recompute in ("none", "full")]


@pytest.mark.parametrize("recompute", ["selective", *SLOW])
def test_peaks_of_the_engine_on_a_cpu_and_what_a_layer_keeps_are_as_planned(recompute: str) -> None:
    """Nothing is compiled here, and attention is masked, which keeps keys and values for every query head."""
    way, network = engine_way(recompute, False, TOKENS), Network(ModelSpec(**SCALED), VOCABULARY)
    four, two = peak({}, 4, way, 1), peak({}, 2, way, 1)

    assert planned_peak({}, 4, way, 1) == pytest.approx(four, rel=0.05)
    spread = 4 * TOKENS * network.queries / MIB if recompute == "none" else 0.0
    assert (four - two) / 2 == pytest.approx((4 * network.layer + kept(network, way, recompute)) / MIB + spread, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("mix", [Mix(full=2, selective=2), Mix(full=1, selective=3), Mix(selective=2, none=2), Mix(full=3, none=1)])
@pytest.mark.parametrize("world", [1, 2])
def test_peaks_of_mixtures_are_as_planned(mix: Mix, world: int) -> None:
    way = mixed(engine_way("budget", False, TOKENS), mix)

    assert planned_peak({}, 4, way, world) == pytest.approx(peak({}, 4, way, world), rel=0.05)


def test_layers_keep_by_their_mode_what_is_planned() -> None:
    """What is there when the backward pass begins, of mixtures less that of `none` everywhere."""
    shape, network = {"vocab_size": 514}, Network(ModelSpec(**SCALED), 514)
    way = engine_way("none", False, 256)
    base = bytes_before_backward(shape, way)
    spread = 4 * way.tokens * network.queries  # masked attention keeps keys and values for every query head
    for mode in ("full", "selective"):
        mix = Mix(none=1)._replace(**{mode: 1})
        less = base - bytes_before_backward(shape, mixed(replace(way, recompute="budget"), mix))

        assert less == pytest.approx(kept(network, way, "none") + spread - kept(network, way, mode), rel=0.05)


def bytes_before_backward(shape: dict[str, Any], way: Way) -> int:
    """Bytes that two layers and the head hold between a forward and a backward pass."""
    config = KeuralConfig(**(SCALED | shape), num_hidden_layers=2)
    config._experts_implementation = "grouped_mm"
    with group(1) as ranks:
        policy, micro = open_policy(KeuralMoECausalLM(config), way, ranks, "split"), random_micro(way.tokens, config.vocab_size)
    step(policy, micro)
    tracker = MemTracker()
    tracker.track_external(policy)
    with tracker:
        output = policy(micro)
        found: int = tracker.get_tracker_snapshot("current")[torch.device("cpu")]["Total"]
    del output
    return found
