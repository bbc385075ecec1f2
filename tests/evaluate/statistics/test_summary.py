"""The figures of a task from the records of its items."""

import math
from dataclasses import replace
from typing import Any

import pytest

from keural.errors import UserError
from keural.evaluate.results.records import ItemResult, TaskResults
from keural.evaluate.statistics import clustered, share_interval, wilson
from keural.evaluate.statistics.summary import summarize


def results(scores: list[float], clusters: list[str | None] | None = None, kind: Any = "choice", **details: Any) -> TaskResults:
    items = [
        ItemResult(
            str(at),
            None if clusters is None else clusters[at],
            score,
            "q",
            "e",
            "g",
            None,
            3,
            {k: v[at] for k, v in details.items()},
        )
        for at, score in enumerate(scores)
    ]
    return TaskResults("kobest_copa", "ko", kind, 0.5, "abc", items)


def test_answers_are_a_share_with_wilson_s_interval() -> None:
    found, expected = summarize(results([1.0] * 7 + [0.0] * 3), "items.jsonl"), wilson(7, 10)
    assert found.to_json() == {
        "score": 0.7, "low": expected.low, "high": expected.high, "n": 10, "chance": 0.5, "items": "items.jsonl"
    }  # fmt: skip


def test_clusters_and_graded_scores_count() -> None:
    scores, names = [0.0, 0.5, 1.0, 1.0, 0.5, 1.0], ["a", "a", "b", "b", "c", "c"]
    assert summarize(results(scores, list(names))).low == pytest.approx(max(clustered(scores, names).low, 0.0))
    assert summarize(results([1.0, 1.0, 0.0, 0.0], ["a", "a", "b", "b"])).low == share_interval([1, 1, 0, 0], list("aabb")).low


def test_texts_are_measured_in_bits_per_byte() -> None:
    found = summarize(replace(results([100.0, 900.0], kind="rolling", bytes=[100, 300]), chance=None))
    assert found.score == 2.5
    assert (found.low, found.n, found.chance) == (0.0, 2, None)
    assert found.high is not None
    assert found.high > 2.5


def test_one_text_has_no_interval_but_one_answer_has() -> None:
    assert (found := summarize(results([80.0], kind="rolling", bytes=[40]))).low == 0.0
    assert found.high is None
    assert summarize(results([1.0])).low == wilson(1, 1).low


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (results([]), "kobest_copa: there are no items"),
        (results([1.0, math.nan]), "kobest_copa: scores: number 2"),
        (results([2.0]), "between 0 and 1"),
        (results([1.0], kind="rolling"), "bytes is None"),
        (results([1.0], kind="rolling", bytes=[0]), "bytes is 0"),
        (results([1.0], kind="rolling", bytes=[True]), "bytes is True"),
    ],
)
def test_what_cannot_be_summed_up_is_refused(broken: TaskResults, words: str) -> None:
    with pytest.raises(UserError, match=words):
        summarize(broken)
