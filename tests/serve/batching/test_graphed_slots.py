"""Slots whose steps have fixed shapes, as a GPU's graphs need them: the logits of reading anew. The kernels equal their twins."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from keural.errors import UserError
from keural.model import KeuralMoECausalLM
from keural.serve.batching.fixed_step import Parts, compiled_parts, mix, step_settings
from keural.serve.batching.graphed_slots import GraphedSlots, can_be_graphed
from keural.serve.batching.slots import Row
from keural.serve.engines.transformers import TransformersEngine
from tests.helpers.company import check_company, check_reads
from tests.helpers.train_small import VOCAB, random_model


@pytest.fixture
def network() -> KeuralMoECausalLM:
    model = random_model(seed=1, scale=3.0, max_position_embeddings=256).eval()
    assert set(model.config.layer_types) == {"sliding_attention", "full_attention"}
    return model


def test_any_order_of_reading_cutting_and_copying_gives_the_logits_of_reading_anew(network: KeuralMoECausalLM) -> None:
    slots = GraphedSlots(network, 5, batch_tokens=16)
    assert check_reads(slots, network, range(VOCAB), rounds=80, longest=200, copies=0.05, atol=1e-5, rtol=1e-4) > 150


@pytest.mark.parametrize(("count", "reuse"), [(1, True), (4, True), (4, False)])
def test_together_with_others_an_answer_is_the_one_of_the_single_stream_engine(model_dir: Path, count: int, reuse: bool) -> None:
    engine = TransformersEngine(model_dir, device="cpu")
    check_company(engine, GraphedSlots(engine.model, count, batch_tokens=16), reuse)


def test_experts_are_counted_once_for_each_token_whatever_fills_up_the_batch(network: KeuralMoECausalLM) -> None:
    slots = GraphedSlots(network, 4)
    slots.prepare()
    assert slots.expert_load().sum() == 0
    slots = GraphedSlots(network, 4)  # which makes its steps when they are needed
    slots.step([Row(slot, [1, 2], 0, True) for slot in range(3)])
    before = slots.expert_load()
    slots.step([Row(slot, [3], 2, True) for slot in range(3)])  # three rows, of which there is no graph: four
    each = (slots.expert_load() - before).sum(dim=1)
    assert each.tolist() == [3 * network.config.num_experts_per_tok] * network.config.num_hidden_layers


def test_what_an_earlier_answer_left_behind_the_end_is_not_seen(network: KeuralMoECausalLM) -> None:
    slots = GraphedSlots(network, 2)
    with torch.inference_mode():
        for keys, values in map(slots._cache.layer, range(network.config.num_hidden_layers)):
            keys.fill_(torch.nan)
            values.fill_(torch.nan)
    slots.step([Row(0, [1, 2, 3], 0, True)])
    assert torch.isfinite(slots.step([Row(0, [4], 3, True)])).all()


def test_the_weights_of_attention_are_shared_with_the_model(network: KeuralMoECausalLM) -> None:
    slots = GraphedSlots(network, 1)
    together, attention = slots._weights[0].query_key_value, network.model.layers[0].self_attn
    assert together.data_ptr() == attention.q_proj.weight.data_ptr()  # type: ignore[union-attr, operator]
    assert torch.equal(together[-len(attention.v_proj.weight) :], attention.v_proj.weight)  # type: ignore[union-attr, arg-type, index]


def test_a_lone_row_and_many_mix_experts_alike(network: KeuralMoECausalLM) -> None:
    slots, draw = GraphedSlots(network, 1), torch.Generator().manual_seed(0)
    states = torch.randn(7, network.config.hidden_size, generator=draw)
    shares, experts = torch.rand(7, 2, generator=draw), torch.stack([torch.randperm(4, generator=draw)[:2] for _ in range(7)])
    activation = step_settings(network).activation
    together = mix(states, shares, experts, slots._weights[0], activation)
    alone = [mix(states[[row]], shares[[row]], experts[[row]], slots._weights[0], activation) for row in range(7)]
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.slow  # 20 seconds of tracing
def test_it_compiles_to_two_versions_whatever_the_number_of_rows(network: KeuralMoECausalLM) -> None:
    torch.compiler.reset()
    network.bfloat16()
    slots, plain = GraphedSlots(network, 8, parts=compiled_parts("aot_eager")), GraphedSlots(network, 8)
    slots.prepare()
    for size, held in ((8, 0), (1, 3), (2, 4), (5, 4), (8, 4)):
        rows = [Row(slot, [5] if held else [5, 6, 7], held if slot < 1 or held != 4 else 3, True) for slot in range(size)]
        rows = [Row(row.slot, row.ids, slots._held(row.slot), True) for row in rows]
        assert torch.equal(slots.step(rows), plain.step(rows))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 * len(Parts._fields)


def test_a_step_that_cannot_be_compiled_says_how_to_do_without(network: KeuralMoECausalLM) -> None:
    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("no compiler was found\nand more")

    with pytest.raises(UserError, match=r"cannot be compiled here \(no compiler was found\); start with --eager"):
        GraphedSlots(network, 1, parts=Parts(layer=broken)).prepare()


def test_slots_that_memory_does_not_hold(network: KeuralMoECausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def grow(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("keural.serve.batching.transformers_slots._Columns.grow", grow)
    with pytest.raises(UserError, match=r"3 answers of 256 tokens do not fit .* fewer with --slots, or --eager"):
        GraphedSlots(network, 3)


def test_positions_that_depend_on_the_length_are_not_graphed(network: KeuralMoECausalLM) -> None:
    assert can_be_graphed(network)
    network.config.rope_parameters["rope_type"] = "dynamic"
    assert not can_be_graphed(network)


KERNELS = """
import torch
from keural.serve.batching import kernels
from keural.serve.batching.device_operations import (
    plain_attend_to_slots, plain_chosen_rows, plain_norm_and_route, plain_sorted_rows,
)
draw = torch.Generator().manual_seed(0)
close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
for sizes in ([1, 0, 1, 0], [3, 0, 20, 1], [70, 2, 0, 0]):
    rows, weight = torch.randn(sum(sizes), 200, generator=draw), torch.randn(len(sizes), 72, 200, generator=draw)
    ends, chosen = torch.tensor(sizes).cumsum(0).to(torch.int32), torch.tensor([3, 1, 2, 0])
    close(kernels.few_rows(rows, weight, kernels.SORTED, ends), plain_sorted_rows(rows, weight, ends))
    close(kernels.few_rows(rows[:1], weight[:1], kernels.ALL, None), rows[:1] @ weight[0].T)
    close(kernels.few_rows(rows[:2], weight, kernels.CHOSEN, chosen, 2), plain_chosen_rows(rows[:2], weight, chosen))
for width, experts, top_k in ((200, 4, 2), (64, 6, 3), (1500, 8, 2)):
    hidden, router = torch.randn(5, width, generator=draw), torch.randn(experts, width, generator=draw) * 0.1
    arguments = (hidden, torch.rand(width, generator=draw), router)
    for found, wanted in zip(kernels.norm_and_route(*arguments, 1e-5, top_k), plain_norm_and_route(*arguments, 1e-5, top_k)):
        close(found, wanted)
    hidden[1, 3] = torch.nan
    normed, shares, chosen = kernels.norm_and_route(*arguments, 1e-5, top_k)
    assert chosen.max() < experts, "a row that is no numbers must not read beyond the matrices"
    assert shares[1].isnan().all() and normed[1].isnan().all() and shares[[0, 2, 3, 4]].isfinite().all()
for width in (8, 48):
    keys, values = (torch.randn(4, 2, 700, width, generator=draw) for _ in range(2))
    keys[:, :, 690:] = values[:, :, 690:] = torch.nan
    arguments = (torch.randn(3, 6, width, generator=draw), keys, values, torch.tensor([3, 0, 1]), torch.tensor([0, 500, 0]),
                 torch.tensor([0, 612, 689]), 0.3)
    close(kernels.attend_to_slots(*arguments), plain_attend_to_slots(*arguments))
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton comes with torch for accelerators")
def test_kernels_equal_their_twins_in_tritons_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", KERNELS], check=True, env=environment)
