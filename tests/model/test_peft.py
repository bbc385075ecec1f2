"""PEFT's adapters around the network: whatever name it passes the cache under, generating is recomputing."""

from typing import Any

import pytest
import torch

from keural.model import KeuralMoECausalLM
from tests.helpers.tiny_network import MakeModel, Tokens

peft = pytest.importorskip("peft")

GREEDY = {"max_new_tokens": 12, "do_sample": False, "disable_compile": True}


def adapted(model: KeuralMoECausalLM) -> Any:
    """A LoRA adapter on the attention, large enough to change the text."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config).eval()


@torch.no_grad()
def test_generating_with_an_adapter_is_recomputing(tiny_model: MakeModel, tokens: Tokens) -> None:
    ids = tokens(1, 12)
    plain = tiny_model(eos_token_id=None).generate(ids, **GREEDY)
    model = adapted(tiny_model(eos_token_id=None))

    generated = model.generate(input_ids=ids, **GREEDY)

    expected = ids
    for _ in range(12):
        expected = torch.cat((expected, model(input_ids=expected, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(generated, expected)
    assert not torch.equal(generated, plain)


def test_a_learned_prefix_reaches_the_network_as_a_cache(tiny_model: MakeModel, tokens: Tokens) -> None:
    """Prefix tuning hands its keys and values over as a cache; a dropped one would change nothing and learn nothing."""
    torch.manual_seed(1)
    ids = tokens(2, 6)
    plain = tiny_model().eval()(input_ids=ids).logits
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(tiny_model(), config).eval()

    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    output.loss.backward()

    assert (output.logits - plain).abs().max() > 1e-3
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters() if parameter.requires_grad)
