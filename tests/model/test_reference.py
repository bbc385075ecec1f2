"""The network against a loop over single tokens in NumPy float64, written from the published description alone."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from keural.model import KeuralMoECausalLM
from tests.helpers.tiny_network import MakeModel, Tokens, decoder_layers

Array = np.ndarray[Any, np.dtype[np.float64]]


class NaiveKeural:
    """The published architecture, one token at a time, without batching, masks, caches or fused weights."""

    def __init__(self, model: KeuralMoECausalLM) -> None:
        self.config = model.config
        assert model.config.sliding_window is not None
        self.window = model.config.sliding_window
        self.weights = {name: w.detach().to(torch.float64).numpy() for name, w in model.state_dict().items()}

    def norm(self, x: Array, name: str) -> Array:
        normalised: Array = x / np.sqrt(np.mean(x * x) + self.config.rms_norm_eps) * self.weights[f"model.{name}.weight"]
        return normalised

    def turn(self, head: Array, position: int) -> Array:
        """Rotary embedding: dimension i turns with dimension i + half by position · theta^(-2i/D), a float32 angle."""
        half = len(head) // 2
        result = head.copy()
        for i in range(half):
            frequency = np.float32(self.config.rope_parameters["rope_theta"] ** (-2 * i / len(head)))
            angle = np.float32(position) * frequency
            cosine, sine = np.cos(angle), np.sin(angle)
            result[i] = head[i] * cosine - head[i + half] * sine
            result[i + half] = head[i + half] * cosine + head[i] * sine
        return result

    def attention(self, layer: int, states: list[Array]) -> list[Array]:
        names = {p: self.weights[f"model.layers.{layer}.self_attn.{p}_proj.weight"] for p in "qkvo"}
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        size = len(names["q"]) // self.config.num_attention_heads
        queries: list[list[Array]] = []
        key_rows: list[list[Array]] = []
        value_rows: list[Array] = []
        for position, x in enumerate(states):
            queries.append([self.turn(h, position) for h in (names["q"] @ x).reshape(-1, size)])
            key_rows.append([self.turn(h, position) for h in (names["k"] @ x).reshape(-1, size)])
            value_rows.append((names["v"] @ x).reshape(-1, size))
        keys, values = np.array(key_rows), np.array(value_rows)
        outputs: list[Array] = []
        for position in range(len(states)):
            # A token sees itself and window - 1 = 512 earlier ones on even layers, everything earlier on odd ones.
            first = max(0, position - (self.window - 1)) if layer % 2 == 0 else 0
            mixed = []
            for head, query in enumerate(queries[position]):
                scores = keys[first : position + 1, head // group] @ query / np.sqrt(size)
                probabilities = np.exp(scores - scores.max())
                probabilities /= probabilities.sum()
                mixed.append(probabilities @ values[first : position + 1, head // group])
            outputs.append(names["o"] @ np.concatenate(mixed))
        return outputs

    def experts(self, layer: int, x: Array) -> Array:
        prefix = f"model.layers.{layer}.mlp"
        logits = self.weights[f"{prefix}.gate.weight"] @ x
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        best = np.argsort(-probabilities)[: self.config.num_experts_per_tok]
        total = np.zeros_like(x)
        for expert in best:
            gate_up = self.weights[f"{prefix}.experts.gate_up_proj"][expert]
            gate, up = gate_up[: len(gate_up) // 2] @ x, gate_up[len(gate_up) // 2 :] @ x
            y = self.weights[f"{prefix}.experts.down_proj"][expert] @ (gate / (1 + np.exp(-gate)) * up)
            total += probabilities[expert] / probabilities[best].sum() * y
        return total

    def logits(self, ids: list[int]) -> Array:
        states = [self.weights["model.embed_tokens.weight"][i] for i in ids]
        for layer in range(self.config.num_hidden_layers):
            block = f"layers.{layer}"
            mixed = self.attention(layer, [self.norm(x, f"{block}.input_layernorm") for x in states])
            states = [x + y for x, y in zip(states, mixed, strict=True)]
            states = [x + self.experts(layer, self.norm(x, f"{block}.post_attention_layernorm")) for x in states]
        embedding = self.weights["model.embed_tokens.weight"]
        return np.array([embedding @ self.norm(x, "norm") for x in states])


def difference(model: KeuralMoECausalLM, ids: torch.Tensor) -> float:
    """Largest difference of logits, relative to their spread."""
    expected = NaiveKeural(model).logits(ids[0].tolist())
    with torch.no_grad():
        measured = model(ids).logits[0].to(torch.float64).numpy()
    return float(np.abs(measured - expected).max() / expected.std())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [1, 8, 9, 10, 40])
def test_logits_are_those_of_the_naive_loop(tiny_model: MakeModel, tokens: Tokens, length: int, attention: str) -> None:
    model = tiny_model(torch.float64, attn_implementation=attention)
    assert difference(model, tokens(1, length)) < 1e-5


def test_single_precision_agrees_too(tiny_model: MakeModel, tokens: Tokens) -> None:
    assert difference(tiny_model(), tokens(1, 40)) < 1e-5


def test_the_published_window_agrees_beyond_its_edge(tiny_model: MakeModel, tokens: Tokens) -> None:
    model = tiny_model(torch.float64, sliding_window=513, num_hidden_layers=2, num_local_experts=3)
    assert difference(model, tokens(1, 540)) < 1e-5


def test_a_window_one_shorter_is_another_model(tiny_model: MakeModel, tokens: Tokens) -> None:
    model = tiny_model(torch.float64)
    assert model.config.sliding_window == 9
    model.config.sliding_window = 8
    expected = NaiveKeural(tiny_model(torch.float64)).logits(tokens(1, 40)[0].tolist())
    with torch.no_grad():
        measured = model(tokens(1, 40)).logits[0].numpy()
    assert np.abs(measured - expected).max() > 1e-2


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_distance_512_is_visible_and_513_hidden_on_even_layers_only(
    tiny_model: MakeModel, tokens: Tokens, layer: int, attention: str
) -> None:
    model = tiny_model(sliding_window=513, attn_implementation=attention)
    seen: dict[str, torch.Tensor] = {}

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        seen["gradient"] = torch.autograd.grad(output[0][0, 600].sum(), kwargs["hidden_states"], retain_graph=True)[0]

    decoder_layers(model)[layer].self_attn.register_forward_hook(keep, with_kwargs=True)
    model(tokens(1, 602))
    sees = seen["gradient"][0].abs().sum(-1) > 0
    first = 600 - 512 if layer % 2 == 0 else 0
    assert sees.nonzero().flatten().tolist() == list(range(first, 601))


def test_rotary_frequencies_stay_in_single_precision(tiny_model: MakeModel) -> None:
    expected = tiny_model().model.rotary_emb.inv_freq
    for dtype in (torch.bfloat16, torch.float64):
        frequencies = tiny_model(dtype).model.rotary_emb.inv_freq
        assert frequencies.dtype == torch.float32
        assert torch.equal(frequencies, expected)


def test_positions_can_be_stretched_by_the_configured_rope_type(tiny_model: MakeModel, tokens: Tokens) -> None:
    """Linear scaling by two: the positions 0, 2, 4, ... are the plain model's 0, 1, 2, ..."""
    stretched = tiny_model(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500_000.0})
    ids, positions = tokens(1, 8), torch.arange(8)[None]
    mask = torch.ones_like(ids)  # given, so that the gaps do not mean new documents
    logits = stretched(ids, position_ids=2 * positions, attention_mask=mask).logits
    torch.testing.assert_close(logits, tiny_model()(ids).logits, atol=1e-5, rtol=1e-4)
