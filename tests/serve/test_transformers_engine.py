"""The transformers engine: answers equal to those of transformers, how they end, and the cache that survives between turns."""

import random
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from keural.errors import UserError
from keural.model import KeuralMoECausalLM
from keural.serve.engines.sampling_params import SamplingParams
from keural.serve.engines.transformers import TransformersEngine
from keural.tokenizer import KeuralTokenizer, Message, render_prompt
from tests.helpers.next_token import token_at
from tests.helpers.streams import run

GREEDY = SamplingParams(temperature=0.0, repetition_penalty=1.0, max_new_tokens=30)


@pytest.fixture(scope="module")
def engine(model_dir: Path) -> TransformersEngine:
    return TransformersEngine(model_dir, device="cpu")


@pytest.fixture
def prompt(tokenizer: KeuralTokenizer) -> list[int]:
    return render_prompt(tokenizer, [Message("user", "the cat 고양이는")])


def generated(model: KeuralMoECausalLM, prompt: list[int], **options: object) -> list[int]:
    """What transformers' own `generate` adds."""
    config = GenerationConfig(pad_token_id=0, **options)
    output = model.generate(torch.tensor([prompt]), generation_config=config)
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("seed", range(4))
def test_sampling_takes_from_transformers_distribution_the_token_at_the_seeds_number(
    engine: TransformersEngine, model: KeuralMoECausalLM, prompt: list[int], seed: int
) -> None:
    ids, _ = run(engine.stream(prompt, SamplingParams(0.7, 0.9, 1.1, max_new_tokens=30, seed=seed), set()))

    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.1), TemperatureLogitsWarper(0.7), TopPLogitsWarper(0.9)])
    numbers, expected = random.Random(seed), list(prompt)
    for _ in range(30):
        read = torch.tensor([expected])
        with torch.inference_mode():
            scores = processors(read, model(read).logits[:, -1].double())  # type: ignore[arg-type]
        expected.append(token_at(scores[0].softmax(-1), numbers.random()))
    assert ids == expected[len(prompt) :]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_equals_transformers(
    engine: TransformersEngine, model: KeuralMoECausalLM, prompt: list[int], penalty: float
) -> None:
    ids, finish = run(engine.stream(prompt, SamplingParams(0.0, repetition_penalty=penalty, max_new_tokens=30), set()))

    assert ids == generated(model, prompt, do_sample=False, repetition_penalty=penalty, max_new_tokens=30)
    assert finish == "length"


def test_same_seed_same_answer_other_seed_another(engine: TransformersEngine, prompt: list[int]) -> None:
    answers = [
        run(engine.stream(prompt, SamplingParams(temperature=1.5, seed=seed, max_new_tokens=12), set()))[0] for seed in (3, 3, 4)
    ]

    assert answers[0] == answers[1] != answers[2]


def test_stop_token_ends_the_answer_and_is_not_yielded(engine: TransformersEngine, prompt: list[int]) -> None:
    free, _ = run(engine.stream(prompt, GREEDY, set()))
    stop = free[5]

    assert run(engine.stream(prompt, GREEDY, {stop})) == (free[: free.index(stop)], "stop")


def test_answer_ends_where_the_context_is_full(engine: TransformersEngine, tokenizer: KeuralTokenizer) -> None:
    ids, finish = run(engine.stream([5] * 155, SamplingParams(temperature=0.0, max_new_tokens=30), set()))

    assert (len(ids), finish) == (5, "context")


def test_prompt_without_room_or_words_is_refused(engine: TransformersEngine) -> None:
    with pytest.raises(UserError, match="has 160 tokens and the model's context is 160"):
        next(engine.stream([5] * 160, GREEDY, set()))
    with pytest.raises(UserError, match="empty"):
        next(engine.stream([], GREEDY, set()))


def conversation(shared: int, tail: list[int]) -> list[int]:
    return [*range(260, 260 + shared), *tail]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (conversation(30, []), conversation(30, [7, 8, 9])),
        (conversation(5, []), conversation(3, [7, 8])),
        (conversation(40, []), conversation(20, [11])),
        (conversation(20, []), conversation(20, [])),
        (conversation(20, []), conversation(4, [])),
        (conversation(3, [9]), conversation(0, [12, 13])),
    ],
    ids=["grows", "diverges early", "diverges beyond the window", "same again", "shorter", "nothing in common"],
)
def test_a_warm_cache_answers_like_a_fresh_engine(model_dir: Path, first: list[int], second: list[int]) -> None:
    warm, fresh = TransformersEngine(model_dir, device="cpu"), TransformersEngine(model_dir, device="cpu")
    run(warm.stream(first, SamplingParams(temperature=0.0, max_new_tokens=4), set()))

    assert run(warm.stream(second, GREEDY, set())) == run(fresh.stream(second, GREEDY, set()))


def test_next_turn_reads_only_what_is_new(engine: TransformersEngine, prompt: list[int]) -> None:
    answer, _ = run(engine.stream(prompt, SamplingParams(temperature=0.0, max_new_tokens=6), set()))

    unread = engine._reuse([*prompt, *answer, 7, 8])

    assert unread == [answer[-1], 7, 8]


def test_closing_cancels_and_the_engine_goes_on(engine: TransformersEngine, prompt: list[int]) -> None:
    expected, _ = run(engine.stream(prompt, GREEDY, set()))
    stream = engine.stream(prompt, GREEDY, set())
    assert list(islice(stream, 3)) == expected[:3]
    stream.close()

    assert list(stream) == []
    assert run(engine.stream(prompt, GREEDY, set()))[0] == expected


def test_interrupt_inside_the_model_does_not_spoil_the_cache(
    engine: TransformersEngine, model: KeuralMoECausalLM, prompt: list[int]
) -> None:
    expected, _ = run(engine.stream(prompt, GREEDY, set()))
    stream = engine.stream([*prompt, *expected[:4], 9], GREEDY, set())
    next(stream)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = engine.model.model.layers[1].register_forward_pre_hook(interrupt)  # the first layer's cache has grown by then
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    hook.remove()

    assert run(engine.stream(prompt, GREEDY, set()))[0] == expected
