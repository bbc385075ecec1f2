"""Two models' results compared: the same items, what only one has, and what is refused."""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from keural.errors import UserError
from keural.evaluate.comparison.paired import compare
from keural.evaluate.results.records import ItemResult, TaskResults
from keural.evaluate.statistics import holm, mcnemar_exact, paired_difference


def results(task: str, scores: dict[str, float], kind: Any = "choice", digest: str = "d", **details: Any) -> TaskResults:
    items = [ItemResult(key, None, score, f"q{key}", "e", "g", None, 1, dict(details)) for key, score in scores.items()]
    return TaskResults(task, "ko" if task.startswith("ko") else "en", kind, 0.5, digest, items)


def answers(right: Sequence[int], n: int = 40) -> dict[str, float]:
    return {str(at): float(at in right) for at in range(n)}


def test_items_are_paired_by_id_whatever_their_order() -> None:
    before = results("copa", answers(range(20)))
    after = results("copa", dict(reversed(answers(range(5, 35)).items())))
    one = compare([before], [after]).tasks[0]
    assert (one.difference.gained, one.difference.lost, one.difference.n) == (15, 5, 40)
    assert (one.before, one.after, one.difference.p) == (0.5, 0.75, mcnemar_exact(15, 5))


def test_what_only_one_has_is_counted_and_left_out() -> None:
    before = results("copa", answers(range(40)))
    after = results("copa", {**answers(range(40), 30), "new": 0.0, "newer": 0.0})
    one = compare([before], [after]).tasks[0]
    assert (one.only_before, one.only_after, one.difference.n) == (10, 2, 30)
    assert (one.before, one.after) == (1.0, 1.0)


def test_an_item_that_a_set_holds_twice_counts_twice() -> None:
    twice = [ItemResult("a", None, score, "q", "e", "g", None, 1) for score in (1.0, 0.0)]
    thrice = [*twice, ItemResult("a", None, 1.0, "q", "e", "g", None, 1)]
    one = compare(
        [TaskResults("t", "en", "choice", None, "d", twice)], [TaskResults("t", "en", "choice", None, "d", thrice)]
    ).tasks[0]
    assert (one.difference.n, one.only_after, one.difference.gained) == (2, 1, 0)


def test_p_values_are_adjusted_over_all_tasks() -> None:
    before = [results(name, answers(range(10))) for name in ("a", "b", "c")]
    after = [results(name, answers(range(10 + more))) for name, more in (("a", 12), ("b", 7), ("c", 2))]
    found = compare(before, after).tasks
    assert [one.p_holm for one in found] == holm([one.difference.p for one in found])
    assert [one.better for one in found] == [True, True, None]
    assert [one.better for one in compare(after, before).tasks] == [False, False, None]


def test_of_bits_less_is_better_and_long_texts_weigh_more() -> None:
    generator = np.random.default_rng(0)
    bits = {str(at): float(value) for at, value in enumerate(generator.normal(2000, 100, size=40))}
    less = {key: 0.9 * value for key, value in bits.items()}
    one = compare([results("prose", bits, "rolling", bytes=1000)], [results("prose", less, "rolling", bytes=1000)]).tasks[0]
    assert one.before == pytest.approx(sum(bits.values()) / 40_000)
    assert one.difference.value == pytest.approx(-0.1 * one.before)
    assert (one.better, one.difference.test) == (True, "bootstrap")
    with pytest.raises(UserError, match="other numbers of bytes"):
        compare([results("prose", bits, "rolling", bytes=1000)], [results("prose", less, "rolling", bytes=999)])


def test_clusters_are_passed_on() -> None:
    def clustered(right: int) -> TaskResults:
        items = [ItemResult(str(at), str(at // 10), float(at < right), "q", "e", "g", None, 1) for at in range(40)]
        return TaskResults("boolq", "ko", "choice", 0.5, "d", items)

    one = compare([clustered(0)], [clustered(20)]).tasks[0]
    expected = paired_difference([0.0] * 40, [1.0] * 20 + [0.0] * 20, [str(at // 10) for at in range(40)])
    assert one.difference == expected
    assert one.better is None


def test_the_json_is_json_and_says_what_cannot_be_told() -> None:
    before, after = results("t", {"a": 0.25}, "generate"), results("t", {"a": 0.5}, "generate")
    told = compare([before, results("x", {"a": 1.0})], [after, results("y", {"a": 1.0})]).to_json()
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert told["tasks"]["t"] | {"p": 1.0, "p_holm": 1.0, "low": None, "high": None, "least": None} == told["tasks"]["t"]
    assert (told["only_before"], told["only_after"]) == (["x"], ["y"])


def test_a_task_measured_in_two_ways_is_compared_way_by_way() -> None:
    ways = [results("t", answers(range(10)), digest="aaaaaaaaaa"), results("t", answers(range(20)), digest="bbbbbbbbbb")]
    assert [one.task for one in compare(ways, ways).tasks] == ["t (aaaaaaaa)", "t (bbbbbbbb)"]
    assert [one.task for one in compare(ways, ways[:1]).tasks] == ["t"]


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ([], [results("t", {"a": 1.0})], "no task is in both: the first has none, the second t"),
        ([results("t", {"a": 1.0})], [results("u", {"a": 1.0})], "no task is in both"),
        ([results("t", {"a": 1.0})], [results("t", {"a": 1.0}, digest="other")], "measured differently"),
        ([results("t", {"a": 1.0})], [results("t", {"b": 1.0})], "no item in common"),
        ([results("t", {"a": math.nan})], [results("t", {"a": 1.0})], "t: scores before: number 1 is nan"),
    ],
)
def test_what_cannot_be_compared_is_refused(before: list[TaskResults], after: list[TaskResults], words: str) -> None:
    with pytest.raises(UserError, match=words):
        compare(before, after)
