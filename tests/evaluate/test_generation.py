"""Greedy answers and answer log-probabilities against naive loops, one sequence at a time and without a cache."""

import copy
from collections.abc import Sequence

import pytest
import torch
from transformers import GenerationConfig

from keural.errors import UserError
from keural.evaluate.generation import Chat, greedy, until
from keural.evaluate.scoring.network import Network
from keural.evaluate.tasks.asking import answer_after
from keural.evaluate.tasks.items import Likelihood
from keural.model import KeuralMoECausalLM
from keural.tokenizer import KeuralTokenizer, Message, render_prompt

CHATS = [
    [Message("user", "the cat")],
    [Message("system", "안녕하세요"), Message("user", "red house 빨간 집과")],
    [
        Message("user", "two"),
        Message("assistant", "blue birds"),
        Message("user", "in the garden 정원에서 봅니다 on Monday morning"),
    ],
    [Message("user", "열하나")],
    [Message("user", "sees a small <|im_end|>")],
]


def answer_logprobs(
    model: KeuralMoECausalLM, tokenizer: KeuralTokenizer, prompts: Sequence[Chat], answers: Sequence[str]
) -> list[float]:
    """Of each answer after its prompt."""
    asked = [
        [Likelihood(*map(tuple, answer_after(tokenizer, prompt, answer)))] for prompt, answer in zip(prompts, answers, strict=True)
    ]
    found = dict(each for batch in Network(model, tokenizer).likelihoods(asked) for each in batch)
    return [found[number][0].total for number in range(len(asked))]


@pytest.fixture(scope="module")
def exact(model: KeuralMoECausalLM) -> KeuralMoECausalLM:
    """The model in float64, for oracles."""
    doubled = copy.deepcopy(model).double()
    doubled.set_experts_implementation("eager")  # grouped matrix products know no float64
    return doubled


def naive_greedy(model: KeuralMoECausalLM, ids: list[int], count: int, stop: set[int]) -> list[int]:
    new: list[int] = []
    for _ in range(count):
        with torch.no_grad():
            token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
        if token in stop:
            break
        new.append(token)
    return new


def naive_logprobs(model: KeuralMoECausalLM, ids: list[int]) -> list[float]:
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(logprobs[position, token]) for position, token in enumerate(ids[1:])]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_greedy_equals_a_naive_loop_whatever_the_batch(
    model: KeuralMoECausalLM, tokenizer: KeuralTokenizer, batch_size: int
) -> None:
    answers = greedy(model, tokenizer, CHATS, max_new_tokens=24, batch_size=batch_size)

    stop = {tokenizer.im_end_id, tokenizer.eos_id}
    expected = [tokenizer.decode(naive_greedy(model, render_prompt(tokenizer, chat), 24, stop)) for chat in CHATS]
    assert answers == expected


def test_greedy_stops_at_im_end(model: KeuralMoECausalLM, tokenizer: KeuralTokenizer) -> None:
    willing = copy.deepcopy(model)
    with torch.no_grad():  # a large row in the direction of the hidden state after the first answer token
        ids = render_prompt(tokenizer, CHATS[0])
        ids += naive_greedy(willing, ids, 1, set())
        hidden = willing.model(torch.tensor([ids])).last_hidden_state[0, -1]
        willing.model.embed_tokens.weight[tokenizer.im_end_id] += 10 * hidden / hidden.norm()

    stop = {tokenizer.im_end_id, tokenizer.eos_id}
    expected = tokenizer.decode(naive_greedy(willing, render_prompt(tokenizer, CHATS[0]), 40, stop))
    short = greedy(willing, tokenizer, [CHATS[0]], max_new_tokens=40)[0]
    assert short == expected
    assert len(short) < len(greedy(model, tokenizer, [CHATS[0]], max_new_tokens=40)[0])


def test_greedy_ignores_the_sampling_defaults_of_the_model(model: KeuralMoECausalLM, tokenizer: KeuralTokenizer) -> None:
    penalized = copy.deepcopy(model)
    penalized.generation_config = GenerationConfig(do_sample=True, repetition_penalty=5.0, eos_token_id=7)

    assert greedy(penalized, tokenizer, CHATS, 24) == greedy(model, tokenizer, CHATS, 24)


def test_greedy_of_nothing_is_nothing(model: KeuralMoECausalLM, tokenizer: KeuralTokenizer) -> None:
    assert greedy(model, tokenizer, [], max_new_tokens=4) == []


def test_prompt_longer_than_the_context_is_refused(model: KeuralMoECausalLM, tokenizer: KeuralTokenizer) -> None:
    long = [[Message("user", "cat " * 200)]]

    with pytest.raises(UserError, match="exceeds the model's context of 160"):
        greedy(model, tokenizer, long, max_new_tokens=4)
    with pytest.raises(UserError, match="exceeds the model's context of 160"):
        answer_logprobs(model, tokenizer, long, ["yes"])


def test_answer_logprobs_sum_over_the_answer_and_its_end(
    model: KeuralMoECausalLM, exact: KeuralMoECausalLM, tokenizer: KeuralTokenizer
) -> None:
    answers = ["blue birds", "감사합니다", "", "the house is small", "<|im_end|>"]

    sums = answer_logprobs(model, tokenizer, CHATS, answers)

    for total, chat, answer in zip(sums, CHATS, answers, strict=True):
        prompt = render_prompt(tokenizer, chat)
        ids = [*prompt, *tokenizer.encode(answer), tokenizer.im_end_id]
        expected = sum(naive_logprobs(exact, ids)[len(prompt) - 1 :])
        assert total == pytest.approx(expected, rel=1e-5)


def test_answer_ends_where_the_context_is_full(model: KeuralMoECausalLM, tokenizer: KeuralTokenizer) -> None:
    chats = [[Message("user", "정원 " * 45)], CHATS[0]]
    lengths = [len(render_prompt(tokenizer, chat)) for chat in chats]
    assert lengths[0] < 160 < lengths[0] + 24, lengths

    long, short = greedy(model, tokenizer, chats, max_new_tokens=24)

    stop = {tokenizer.im_end_id, tokenizer.eos_id}
    assert long == tokenizer.decode(naive_greedy(model, render_prompt(tokenizer, chats[0]), 160 - lengths[0], stop))
    assert short == greedy(model, tokenizer, [CHATS[0]], max_new_tokens=24)[0]


def test_until_cuts_before_the_first_stop() -> None:
    assert until([5, 6, 2, 7, 2], {2, 9}) == [5, 6]
    assert until([5, 6], {2}) == [5, 6]
