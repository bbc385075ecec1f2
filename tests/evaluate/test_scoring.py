"""The scorer against reading each request by itself: shared contexts, windows, dtypes, order, and nothing lost."""

import copy
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keural.errors import UserError
from keural.evaluate.scoring.network import Network
from keural.evaluate.scoring.rows import Row, batches, inputs, rows_of
from keural.evaluate.tasks.items import Likelihood, LogProb
from keural.model import KeuralMoECausalLM
from keural.tokenizer import KeuralTokenizer
from tests.helpers.examples import examples


def alone(model: KeuralMoECausalLM, request: Likelihood) -> LogProb:
    """One request without any sharing, its logits whole."""
    ids = torch.tensor([inputs(request)])
    with torch.no_grad():
        logprobs = model(ids).logits[0].float().log_softmax(-1)[-len(request.continuation) :]
    labels = torch.tensor(request.continuation)
    return LogProb(float(logprobs.gather(-1, labels[:, None]).double().sum()), bool((logprobs.argmax(-1) == labels).all()))


def some_groups(vocabulary: int, count: int, seed: int = 0) -> list[list[Likelihood]]:
    """Items with two to four choices, some of one token, some that begin alike, some the same, one long."""
    draw = random.Random(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(4, vocabulary) for _ in range(length))

    common, groups = ids(20), []
    for number in range(count):
        context = (*(common if number % 2 else ()), *ids(draw.randrange(1, 30)))
        length = 1 if number % 3 == 0 else draw.randrange(1, 12)
        start = ids(3) if number % 5 == 0 else ()
        groups.append([Likelihood(context, (*start, *ids(length))) for _ in range(draw.randrange(2, 5))])
    groups.append([Likelihood(ids(100), ids(40))])
    groups.append(groups[0])
    groups.append([Likelihood((1,), ids(5)), Likelihood((*ids(4),), ids(2))])
    return groups


def answers(network: Network, groups: list[list[Likelihood]]) -> list[list[LogProb]]:
    found = {number: result for batch in network.likelihoods(groups) for number, result in batch}
    return [found[number] for number in range(len(groups))]


@pytest.fixture(scope="module")
def network(model: KeuralMoECausalLM, tokenizer: KeuralTokenizer) -> Network:
    return Network(copy.deepcopy(model), tokenizer)


def test_every_request_reads_as_it_would_by_itself(network: Network, model: KeuralMoECausalLM) -> None:
    groups = some_groups(model.config.vocab_size, 40)

    for group, found in zip(groups, answers(network, groups), strict=True):
        for request, answer in zip(group, found, strict=True):
            expected = alone(model, request)
            assert answer.total == pytest.approx(expected.total, abs=1e-4)
            assert answer.greedy == expected.greedy


def test_the_result_does_not_depend_on_the_batch_or_the_order(network: Network, model: KeuralMoECausalLM) -> None:
    groups = some_groups(model.config.vocab_size, 12)
    other = Network(copy.deepcopy(network.model), network.tokenizer)
    other.tokens = 64

    expected = answers(network, groups)
    found = answers(other, groups[::-1])[::-1]
    for one, two in zip(expected, found, strict=True):
        assert [answer.total for answer in one] == pytest.approx([answer.total for answer in two], abs=1e-4)


def test_a_greedy_continuation_is_known(network: Network, model: KeuralMoECausalLM) -> None:
    ids = [5, 9, 30]
    with torch.no_grad():
        best = int(model(torch.tensor([ids])).logits[0, -1].argmax())

    (found,) = answers(network, [[Likelihood(tuple(ids), (best,)), Likelihood(tuple(ids), (best + 1,))]])

    assert [answer.greedy for answer in found] == [True, False]


def test_choices_of_one_token_cost_one_row(model: KeuralMoECausalLM) -> None:
    context = tuple(range(10, 40))

    (row,) = rows_of([[Likelihood(context, (token,)) for token in (5, 6, 7, 8)]], 0.001)

    assert row.ids == list(context)
    assert {edge.parent for edge in row.edges} == {len(context) - 1}


def test_what_items_share_is_read_once() -> None:
    shared = tuple(range(1000))
    groups = [[Likelihood((*shared, 2000 + number), (1, 2)), Likelihood((*shared, 2000 + number), (3, 4))] for number in range(50)]

    rows = list(rows_of(groups, 1 / 2000))

    assert sum(len(row.ids) for row in rows) <= 1000 * len(rows) + 50 * 3
    assert len(rows) < 5


@examples(15)
@given(
    st.lists(
        st.lists(
            st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.lists(st.integers(0, 2), min_size=1, max_size=4)),
            min_size=1,
            max_size=4,
        ),
        max_size=12,
    )
)
def test_each_token_of_each_request_is_predicted_once_after_what_stands_before_it(
    cases: list[list[tuple[list[int], list[int]]]],
) -> None:
    groups = [[Likelihood(tuple(context), tuple(continuation)) for context, continuation in case] for case in cases]

    rows = list(rows_of(groups, 0.01))

    assert sorted(number for row in rows for number in row.groups) == list(range(len(groups)))
    said = {}
    for row in rows:
        ends = row.ends()
        for edge in row.edges:
            ancestors = [place for place in range(edge.parent + 1) if ends[place] > edge.parent]
            assert [row.depths[place] for place in ancestors] == list(range(len(ancestors)))
            said.setdefault((edge.group, edge.request), []).append(([row.ids[place] for place in ancestors], edge.label))
    for number, group in enumerate(groups):
        for index, request in enumerate(group):
            whole = request.context + request.continuation
            expected = [(list(whole[:place]), whole[place]) for place in range(len(request.context), len(whole))]
            assert said[number, index] == expected


def test_batches_hold_every_row_within_the_tokens_allowed() -> None:
    rows = [Row(ids=[0] * size) for size in (90, 40, 30, 30, 10, 1)]

    found = list(batches(rows, 100))

    assert [row for batch in found for row in batch] == rows
    assert all(len(batch) == 1 or len(batch) * len(batch[0].ids) <= 100 for batch in found)


@pytest.mark.parametrize("window", [None, 5])
def test_windows_of_sliding_layers_count_what_a_request_reads(
    make_config: object, tokenizer: KeuralTokenizer, window: int | None
) -> None:
    torch.manual_seed(1)
    small = KeuralMoECausalLM(make_config(sliding_window=window)).eval()  # type: ignore[operator]
    groups = some_groups(small.config.vocab_size, 8, seed=3)

    found = answers(Network(copy.deepcopy(small), tokenizer), groups)

    for group, results in zip(groups, found, strict=True):
        assert [answer.total for answer in results] == pytest.approx([alone(small, request).total for request in group], abs=1e-4)


def test_log_probabilities_of_bfloat16_weights_are_computed_in_float32(
    model: KeuralMoECausalLM, tokenizer: KeuralTokenizer
) -> None:
    halved = copy.deepcopy(model).to(torch.bfloat16)

    (found,) = answers(Network(halved, tokenizer), [[Likelihood((5, 6), (token,)) for token in range(halved.config.vocab_size)]])

    assert sum(torch.tensor([answer.total for answer in found]).double().exp()).item() == pytest.approx(1, abs=1e-5)


def test_damaged_weights_are_refused(model: KeuralMoECausalLM, tokenizer: KeuralTokenizer) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")

    with pytest.raises(UserError, match="not finite"):
        answers(Network(broken, tokenizer), [[Likelihood((5, 6), (7,))]])
