"""Generation by transformers, and the arguments that its releases pass to the network.

In: a tiny model. Every way to generate gives the text of recomputing each step from the ids alone, whatever the installed release
calls the cache; `make test-transformers` runs this file under each release that is supported.
"""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig

from keural.model import KeuralMoECausalLM
from keural.model.modeling_keural import CACHE_NAME, CACHE_NAMES, KNOWN_ARGUMENTS
from tests.helpers.tiny_network import MakeModel, Tokens

NEW = 12
"""Tokens to generate: the prompts end before the window of 9 keys is full and after it."""
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "disable_compile": True}


@torch.no_grad()
def greedy_by_recomputing(model: KeuralMoECausalLM, ids: torch.Tensor, steps: int) -> torch.Tensor:
    for _ in range(steps):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    return ids


def batched_continuously(model: KeuralMoECausalLM, prompts: list[torch.Tensor]) -> list[list[int]]:
    """The new tokens of each prompt, by transformers' paged cache."""
    config = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)
    outputs = model.generate_batch(
        [prompt[0].tolist() for prompt in prompts],
        generation_config=config,
        continuous_batching_config=small,
        progress_bar=False,
        warmup=False,
    )
    return [list(output.generated_tokens) for output in outputs.values()]


def padded_batch(long: torch.Tensor, short: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts ``[1, T]`` in one batch, the shorter padded on the left, and the mask."""
    padding = long.shape[1] - short.shape[1]
    mask = torch.ones(2, long.shape[1], dtype=torch.long)
    mask[1, :padding] = 0
    return torch.cat((long, torch.nn.functional.pad(short, (padding, 0)))), mask


CACHES: dict[str, dict[str, Any]] = {
    "none": {"use_cache": False},
    "dynamic": {"cache_implementation": "dynamic"},
    "static": {"cache_implementation": "static"},
}


@pytest.fixture
def model(tiny_model: MakeModel) -> KeuralMoECausalLM:
    return tiny_model(eos_token_id=None)


@pytest.fixture
def long(tokens: Tokens) -> torch.Tensor:
    return tokens(1, 12)


@pytest.fixture
def short(tokens: Tokens) -> torch.Tensor:
    return tokens(1, 4, seed=2)


@pytest.mark.parametrize("cache", CACHES)
def test_greedy_text_of_one_prompt_is_recomputing_it(
    model: KeuralMoECausalLM, long: torch.Tensor, short: torch.Tensor, cache: str
) -> None:
    for prompt in (long, short):
        assert torch.equal(model.generate(prompt, **GREEDY, **CACHES[cache]), greedy_by_recomputing(model, prompt, NEW))


@pytest.mark.parametrize("cache", CACHES)
def test_greedy_text_of_a_padded_batch_is_recomputing_each_prompt(
    model: KeuralMoECausalLM, long: torch.Tensor, short: torch.Tensor, cache: str
) -> None:
    batch, mask = padded_batch(long, short)
    generated = model.generate(batch, attention_mask=mask, **GREEDY, **CACHES[cache])
    assert torch.equal(generated[:1], greedy_by_recomputing(model, long, NEW))
    assert torch.equal(generated[1:, 8:], greedy_by_recomputing(model, short, NEW))


def test_a_cache_of_ones_own_goes_on_where_it_ended(model: KeuralMoECausalLM, long: torch.Tensor) -> None:
    """Under the release's own name, as its documentation says."""
    cache = DynamicCache(config=model.config)
    first = model.generate(long, **{CACHE_NAME: cache}, **{**GREEDY, "max_new_tokens": 3})
    assert torch.equal(model.generate(first, **{CACHE_NAME: cache}, **GREEDY), greedy_by_recomputing(model, long, 3 + NEW))


@pytest.mark.parametrize("assistant", ["another model", "prompt lookup"])
def test_assisted_decoding_is_greedy_decoding(
    model: KeuralMoECausalLM, tiny_model: MakeModel, long: torch.Tensor, short: torch.Tensor, assistant: str
) -> None:
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if assistant == "another model":
        options = {"assistant_model": tiny_model(seed=0, eos_token_id=None, num_hidden_layers=4, rms_norm_eps=0.3)}
    for prompt in (torch.cat((long, long), dim=1), short):
        assert torch.equal(model.generate(prompt, **GREEDY, **options), greedy_by_recomputing(model, prompt, NEW))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_beam_search_finds_with_a_cache_what_it_finds_without(
    model: KeuralMoECausalLM, long: torch.Tensor, short: torch.Tensor, cache: str
) -> None:
    batch, mask = padded_batch(long, short)
    beams = {**GREEDY, "num_beams": 3, "num_return_sequences": 3}
    alone = model.generate(long, **beams, **CACHES["none"])
    assert torch.equal(model.generate(long, **beams, **CACHES[cache]), alone)
    together = model.generate(batch, attention_mask=mask, **beams, **CACHES["none"])
    assert torch.equal(model.generate(batch, attention_mask=mask, **beams, **CACHES[cache]), together)
    assert torch.equal(together[:3], alone)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_continuous_batching_is_greedy_decoding(
    tiny_model: MakeModel, long: torch.Tensor, short: torch.Tensor, attention: str
) -> None:
    model = tiny_model(eos_token_id=None, attn_implementation=attention)
    expected = [greedy_by_recomputing(model, prompt, NEW)[0, prompt.shape[1] :].tolist() for prompt in (long, short)]
    assert batched_continuously(model, [long, short]) == expected


def test_generation_under_gradient_checkpointing_is_greedy_decoding(model: KeuralMoECausalLM, long: torch.Tensor) -> None:
    """As a trainer samples between its steps. Some releases take the cache away from the blocks of a model in training mode."""
    expected = greedy_by_recomputing(model, long, NEW)
    model.gradient_checkpointing_enable()
    assert torch.equal(model.train().generate(long, **GREEDY), expected)


@pytest.fixture
def passed(model: KeuralMoECausalLM, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of all arguments that the model's forward pass is called with, as they come."""
    names: set[str] = set()
    forward = model.forward

    @functools.wraps(forward)
    def recording(*arguments: Any, **named: Any) -> Any:
        names.update(named)
        return forward(*arguments, **named)

    monkeypatch.setattr(model, "forward", recording)
    return names


def ways_to_generate(model: KeuralMoECausalLM, other: KeuralMoECausalLM, prompt: torch.Tensor) -> Iterator[Any]:
    """One run of each way that the installed release has."""
    for cache in CACHES.values():
        yield model.generate(prompt, **GREEDY, **cache)
        yield model.generate(prompt, **GREEDY, num_beams=2, **cache)
    recorded = {"output_attentions": True, "output_hidden_states": True, "output_scores": True, "return_dict_in_generate": True}
    model.set_attn_implementation("eager")
    yield model.generate(prompt, **GREEDY, **recorded)
    model.set_attn_implementation("sdpa")
    yield model.generate(inputs_embeds=model.get_input_embeddings()(prompt), **GREEDY)
    yield model.generate(prompt, **GREEDY, assistant_model=other)
    yield model.generate(prompt, **GREEDY, prompt_lookup_num_tokens=2)
    yield model.generate(prompt, **GREEDY, prefill_chunk_size=3)
    yield model.generate(prompt, **GREEDY, guidance_scale=1.5)
    yield model.generate(prompt, max_new_tokens=4, do_sample=True, num_beams=2, num_return_sequences=2)
    yield batched_continuously(model, [prompt])


def test_every_argument_of_generate_is_known(
    model: KeuralMoECausalLM, tiny_model: MakeModel, passed: set[str], long: torch.Tensor
) -> None:
    """None of the calls is refused, and what has no parameter of its own is on the list."""
    assert all(generated is not None for generated in ways_to_generate(model, tiny_model(eos_token_id=None), long))
    usual = {"input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep", "inputs_embeds", CACHE_NAME}
    assert usual | {"output_attentions", "output_hidden_states", "read_index"} <= passed
    parameters = set(KeuralMoECausalLM.forward.__wrapped__.__code__.co_varnames)
    assert passed - parameters <= KNOWN_ARGUMENTS


@pytest.mark.parametrize("name", CACHE_NAMES)
@torch.no_grad()
def test_the_cache_is_taken_and_returned_by_either_name(model: KeuralMoECausalLM, tokens: Tokens, name: str) -> None:
    ids = tokens(2, 20)
    for network in (model, model.model):
        cache = DynamicCache(config=model.config)
        first, second = (network(part, **{name: cache}, use_cache=True) for part in ids.split(10, dim=1))
        torch.testing.assert_close(second[0], network(ids, use_cache=False)[0][:, 10:], atol=1e-5, rtol=1e-5)
        for output in (first, second):
            assert getattr(output, name) is cache
            assert output[name] is output.get(name) is cache
            assert name in output
            assert sum(value is cache for value in output.to_tuple()) == 1


def test_no_cache_has_no_name(model: KeuralMoECausalLM, long: torch.Tensor) -> None:
    output = model(long, use_cache=False)
    for name in CACHE_NAMES:
        assert getattr(output, name) is None
        assert name not in output
        assert output.get(name, "nothing") == "nothing"


def test_two_caches_are_refused_and_one_under_two_names_is_not(model: KeuralMoECausalLM, long: torch.Tensor) -> None:
    one, other = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for network in (model, model.model):
        with pytest.raises(ValueError, match="two names of one argument"):
            network(long, past_key_values=one, cache=other)
    assert model(long, past_key_values=one, cache=one).cache.get_seq_length() == 12


@pytest.mark.parametrize("name", ["kv_cache", "cache_params", "past_key_value", "cache_position", "token_type_ids", "mems", "seed"])
def test_an_argument_that_is_not_known_is_refused(model: KeuralMoECausalLM, long: torch.Tensor, name: str) -> None:
    for network in (model, model.model):
        with pytest.raises(TypeError, match=rf"does not know the argument {name} .*transformers"):
            network(long, **{name: torch.zeros(1)})
        network(long, **{name: None})  # carries nothing


def test_what_engines_pass_along_is_not_refused(model: KeuralMoECausalLM, long: torch.Tensor) -> None:
    """vLLM (its hidden states for speculation, too) and SGLang; both call the base model."""
    positions = torch.arange(12)[None]
    arguments = {"attention_instances": {}, "forward_batch": object(), "use_cache": False, "return_dict": False}
    assert isinstance(model.model(long, position_ids=positions, **arguments), tuple)


def test_packed_documents_without_positions_are_refused(model: KeuralMoECausalLM, long: torch.Tensor) -> None:
    """Attention functions other than flash attention would let them see each other."""
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    for name, value in {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "seq_idx": torch.zeros(1, 12)}.items():
        with pytest.raises(ValueError, match="need position_ids"):
            model(long, **{name: value})
    positions = torch.cat((torch.arange(5), torch.arange(7)))[None]
    alone = torch.cat([model(part).logits for part in long.split([5, 7], dim=1)], dim=1)
    packed = model(
        long, position_ids=positions, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=7, max_length_k=7, use_cache=False
    )
    torch.testing.assert_close(packed.logits, alone, atol=1e-5, rtol=1e-5)


def test_a_cache_under_gradient_checkpointing_is_refused(model: KeuralMoECausalLM, long: torch.Tensor) -> None:
    model.gradient_checkpointing_enable()
    for name in CACHE_NAMES:
        with pytest.raises(ValueError, match="gradient checkpointing"):
            model.train()(long, **{name: DynamicCache(config=model.config)})
    model(long, labels=long).loss.backward()  # no cache is made there, whatever the configuration says


def test_shifted_labels_are_labels(model: KeuralMoECausalLM, long: torch.Tensor) -> None:
    shifted = torch.nn.functional.pad(long[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(long, shift_labels=shifted).loss, model(long, labels=long).loss)


def test_generation_ends_at_the_end_of_turn(model: KeuralMoECausalLM, tokens: Tokens) -> None:
    ids = tokens(1, 6)
    third = greedy_by_recomputing(model, ids, 3)[0, -1].item()
    generated = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=third)
    assert generated[0, -1] == third
    assert generated.shape[1] <= 9


def test_sampling_repeats_with_its_seed(tiny_model: MakeModel, tokens: Tokens) -> None:
    model, ids, runs = tiny_model(eos_token_id=None, initializer_range=0.02), tokens(1, 6), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(model.generate(ids, max_new_tokens=10, do_sample=True, temperature=0.7, top_p=0.9).tolist())
    assert runs[0] == runs[1] != runs[2]
