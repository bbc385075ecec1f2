"""Answers on the scheduler: those of a plain loop, whatever is answered beside them; stop strings; ends."""

import copy
from collections.abc import Sequence

import pytest
import torch

from keural.errors import UserError
from keural.evaluate.generated.kind import answer
from keural.evaluate.generated.writing import write_answers
from keural.evaluate.scoring.network import Network
from keural.evaluate.tasks.items import Writing, Written
from keural.model import KeuralMoECausalLM
from keural.serve.batching.transformers_slots import TransformersSlots
from keural.tokenizer import KeuralTokenizer

TEXTS = ["the cat sees", "고양이는 작은", "two blue birds in the garden on Monday morning with", "a", "정원에서 봅니다", "the cat"]


@pytest.fixture(scope="module")
def network(model: KeuralMoECausalLM, tokenizer: KeuralTokenizer) -> Network:
    return Network(copy.deepcopy(model), tokenizer)


@pytest.fixture(scope="module")
def slots(network: Network) -> TransformersSlots:
    return TransformersSlots(network.model, 3)


def prompt(tokenizer: KeuralTokenizer, text: str) -> tuple[int, ...]:
    return (tokenizer.bos_id, *tokenizer.encode(text))


def answers(slots: TransformersSlots, tokenizer: KeuralTokenizer, wanted: Sequence[Writing]) -> list[Written]:
    found = dict(write_answers(slots, tokenizer, wanted))
    return [found[number] for number in range(len(wanted))]


def plain_greedy(model: KeuralMoECausalLM, tokenizer: KeuralTokenizer, ids: Sequence[int], count: int) -> tuple[list[int], str]:
    """The most probable tokens, every one from a forward pass over everything before it."""
    found: list[int] = []
    while len(found) < count:
        with torch.no_grad():
            token = int(model(torch.tensor([[*ids, *found]])).logits[0, -1].argmax())
        if token in (tokenizer.im_end_id, tokenizer.eos_id):
            return found, "stop"
        found.append(token)
        if len(ids) + len(found) >= model.config.max_position_embeddings:
            return found, "context"
    return found, "length"


def test_answers_are_those_of_a_plain_loop(slots: TransformersSlots, model: KeuralMoECausalLM, tokenizer: KeuralTokenizer) -> None:
    wanted = [Writing(prompt(tokenizer, text), 5 + 3 * place) for place, text in enumerate(TEXTS)]

    for one, written in zip(wanted, answers(slots, tokenizer, wanted), strict=True):
        ids, end = plain_greedy(model, tokenizer, one.prompt_ids, one.max_new_tokens)
        assert written == Written(tokenizer.decode(ids), len(ids), end)


def test_a_stop_string_ends_an_answer_before_itself(slots: TransformersSlots, tokenizer: KeuralTokenizer) -> None:
    ids = prompt(tokenizer, "the cat sees")
    (whole,) = answers(slots, tokenizer, [Writing(ids, 30)])
    stop = whole.text[8:11]
    (cut,) = answers(slots, tokenizer, [Writing(ids, 30, (stop, "never there"))])
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.end == "stop"
    assert cut.tokens < whole.tokens


def test_a_full_context_ends_an_answer(slots: TransformersSlots, model: KeuralMoECausalLM, tokenizer: KeuralTokenizer) -> None:
    length = model.config.max_position_embeddings
    ids = (tokenizer.bos_id, *tokenizer.encode("the cat sees a small red house " * 60))[: length - 3]
    (written,) = answers(slots, tokenizer, [Writing(ids, 50)])
    assert written.end in ("context", "stop")
    assert written.tokens <= 3
    with pytest.raises(UserError, match="context is"):
        answers(slots, tokenizer, [Writing((*ids, 5, 5, 5), 50)])


def test_samples_follow_their_seeds(slots: TransformersSlots, tokenizer: KeuralTokenizer) -> None:
    ids = prompt(tokenizer, "the cat")
    wanted = [Writing(ids, 12, temperature=1.5, seed=seed) for seed in (1, 2, 1, 3)]
    first, second, again, third = answers(slots, tokenizer, wanted)
    assert first == again
    assert len({first.text, second.text, third.text}) == 3
    assert answers(slots, tokenizer, [wanted[1]]) == [second]


def test_a_network_that_gives_no_numbers_is_refused(model: KeuralMoECausalLM, tokenizer: KeuralTokenizer) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(UserError, match="finite"):
        list(write_answers(TransformersSlots(broken, 2), tokenizer, [Writing(prompt(tokenizer, "a"), 4)] * 3))


def test_groups_come_when_all_of_them_are_there(network: Network, tokenizer: KeuralTokenizer) -> None:
    before = network.model.config._experts_implementation
    groups = [[Writing(prompt(tokenizer, text), 4), Writing(prompt(tokenizer, text), 9)] for text in TEXTS]
    found = dict(pair for batch in answer(network, groups) for pair in batch)
    assert sorted(found) == list(range(len(TEXTS)))
    assert all(short.text == long.text[: len(short.text)] for short, long in found.values() if short.end == "length")
    assert network.model.config._experts_implementation == before
    assert list(answer(network, [])) == []
