"""Slots of the network: logits equal to those of reading everything anew, whatever was cut, copied and read before beside them."""

from pathlib import Path

import pytest

from keural.model import KeuralMoECausalLM
from keural.serve.batching.slots import Row
from keural.serve.batching.transformers_slots import TransformersSlots
from keural.serve.engines.transformers import TransformersEngine
from tests.helpers.company import check_company, check_reads
from tests.helpers.train_small import VOCAB, random_model


@pytest.fixture(params=["sdpa", "eager"])
def network(request: pytest.FixtureRequest) -> KeuralMoECausalLM:
    model = random_model(seed=1, scale=3.0, max_position_embeddings=256).eval()
    assert set(model.config.layer_types) == {"sliding_attention", "full_attention"}
    model.set_attn_implementation(request.param)
    return model


def test_any_order_of_reading_cutting_and_copying_gives_the_logits_of_reading_anew(network: KeuralMoECausalLM) -> None:
    slots = TransformersSlots(network, 4, batch_tokens=16)
    assert check_reads(slots, network, range(VOCAB), rounds=150, longest=200, copies=0.05, atol=1e-5, rtol=1e-4) > 300


def test_in_a_steady_state_a_step_moves_nothing(network: KeuralMoECausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = TransformersSlots(network, 3)
    lengths = [5, 30, 11]
    slots.step([Row(slot, [1] * length, 0, True) for slot, length in enumerate(lengths)])
    slots.step([Row(slot, [2], length, True) for slot, length in enumerate(lengths)])
    moves: list[int] = []
    monkeypatch.setattr(slots._cache, "move", lambda *args: moves.append(1))
    for step in range(20):
        slots.step([Row(slot, [3], length + 1 + step, True) for slot, length in enumerate(lengths)])
    assert not moves


def test_a_part_of_a_prompt_that_nobody_samples_after_does_not_pass_the_head(network: KeuralMoECausalLM) -> None:
    passed: list[int] = []
    network.lm_head.register_forward_hook(lambda _module, _inputs, output: passed.append(output.shape[1]))
    slots = TransformersSlots(network, 2)
    assert slots.step([Row(0, [1, 2, 3], 0, False)]).shape == (0, VOCAB)
    assert passed == []
    assert slots.step([Row(0, [4, 5], 3, True), Row(1, [6], 0, False)]).shape == (1, VOCAB)
    assert passed == [1]


def test_rows_that_do_not_follow_what_a_slot_holds_are_refused(network: KeuralMoECausalLM) -> None:
    slots = TransformersSlots(network, 1)
    with pytest.raises(ValueError, match="holds 0 tokens, not 3"):
        slots.step([Row(0, [1], 3, True)])


def test_expert_load_counts_every_token_of_every_layer(network: KeuralMoECausalLM) -> None:
    slots = TransformersSlots(network, 2)
    slots.step([Row(0, [1, 2, 3], 0, True), Row(1, [4, 5], 0, True)])
    load = slots.expert_load()
    assert load.shape == (network.config.num_hidden_layers, network.config.num_local_experts)
    # the last block mixes experts only where logits are wanted
    assert load.sum(dim=1).tolist() == [network.config.num_experts_per_tok * count for count in (5, 2)]


@pytest.mark.parametrize(("count", "reuse"), [(1, True), (4, True), (8, True), (4, False)])
def test_together_with_others_an_answer_is_the_one_of_the_single_stream_engine(model_dir: Path, count: int, reuse: bool) -> None:
    engine = TransformersEngine(model_dir, device="cpu")
    check_company(engine, TransformersSlots(engine.model, count, batch_tokens=16), reuse)
