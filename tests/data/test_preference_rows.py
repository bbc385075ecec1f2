"""Rows with several answers: which one is the better is what the row says, or the row is counted, or its source refused."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from keural.data.adapters import ADAPTERS
from keural.data.adapters.judgements import label_key, number_of, ranked_pairs
from keural.data.adapters.preferences import ADAPTERS as PREFERENCES
from keural.data.adapters.preferences import SCORES
from keural.data.adapters.reasons import reason_of
from keural.data.field_use import FieldUse
from keural.data.prepare import prepare
from keural.data.prepared import Prepared
from keural.data.records import Drop, PreferencePair, Record
from keural.data.sources import open_source
from keural.data.tokens.store import TokenStore
from keural.errors import UserError
from keural.recipe import DataSpec, SourceSpec
from keural.tokenizer import KeuralTokenizer
from keural.tokenizer.message import with_tools
from tests.helpers.examples import examples

Pair = tuple[list[tuple[str, str]], str, str]
ASKED = {"role": "user", "content": "q"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
LABELLED = {"prompt": "q", "a": "one", "b": "two"}


def convert(value: Any, **options: Any) -> Record | Drop:
    """The record of a row that gives one."""
    (record,) = converted(value, **options)
    return record


def converted(value: Any, **options: Any) -> list[Any]:
    """The records of a row."""
    source = SourceSpec(name="s", adapter="preference", options=options)
    adapter = ADAPTERS["preference"]
    assert adapter.check is not None
    assert adapter.check(source) is None
    split = adapter.splitter(source)
    return [adapter(each, source, "file:1") for each in (split(value, source) if split else [value])]


def kept(record: Any) -> PreferencePair:
    assert isinstance(record, PreferencePair), record
    return record


def pair(record: Any) -> Pair:
    found = kept(record)
    return [(turn.role, turn.content) for turn in found.prompt], found.chosen, found.rejected


def answers(record: Any) -> tuple[str, str]:
    return pair(record)[1:]


def reason(record: Any) -> str:
    assert isinstance(record, Drop), record
    assert reason_of(record.reason), record.reason
    return record.reason


# Labels


@pytest.mark.parametrize("label", [1, 1.0, "1", "1 ", " 1.0", np.int64(1), np.float32(1.0)])
def test_one_however_it_is_written_means_the_first_answer(label: Any) -> None:
    assert answers(convert(LABELLED | {"label": label}, answers=["a", "b"])) == ("one", "two")


@pytest.mark.parametrize(
    ("labels", "first", "second"),
    [
        ({0: "first", 1: "second"}, (0, "0", 0.0, "0.0"), (1, "1.0", 1.0)),
        ({1: "first", 0: "second"}, (1, "1"), (0, "0")),
        ({"A": "first", "B": "second"}, ("A", "a", " A "), ("B", "b")),
        ({"a1": "first", "a2": "second"}, ("a1",), ("a2",)),
        ({"left": "first", "right": "second"}, ("left", "LEFT"), ("right",)),
        ({"response_a": "first", "response_b": "second"}, ("response_a",), ("response_b",)),
        ({True: "first", False: "second"}, (True, "true", "True"), (False, "false")),
        ({"true": "second", "false": "first"}, (False,), (True,)),
        ({-1: "first", 1: "second"}, (-1, "-1", -1.0), ("+1", 1)),
        ({"왼쪽": "first", "오른쪽": "second"}, ("왼쪽",), ("오른쪽 ",)),
    ],
)
def test_a_label_means_what_the_option_says(labels: dict[Any, str], first: tuple[Any, ...], second: tuple[Any, ...]) -> None:
    for label in first:
        assert answers(convert(LABELLED | {"label": label}, answers=["a", "b"], labels=labels)) == ("one", "two")
    for label in second:
        assert answers(convert(LABELLED | {"label": label}, answers=["a", "b"], labels=labels)) == ("two", "one")


@pytest.mark.parametrize(
    "label", [0, 3, -1, 1.5, "0", "A", "x", "first", "a", True, False, "true", "nan", "none", [1], {"1": 1}, float("inf")]
)
def test_a_value_of_no_declared_meaning_is_no_label(label: Any) -> None:
    record = convert(LABELLED | {"label": label}, answers=["a", "b"])
    assert reason(record) == "undeclared_value"


@pytest.mark.parametrize("names", [("response_0", "response_1"), ("answer0", "answer1"), ("답변2", "답변1")])
def test_a_number_is_not_read_against_the_numbers_of_the_answers(names: tuple[str, str]) -> None:
    row = dict(zip(names, ("one", "two"), strict=True)) | {"prompt": "q", "label": 1}
    assert reason(convert(row, answers=list(names))) == "undeclared_value"
    assert answers(convert(row, answers=list(names), labels={0: "first", 1: "second"})) == ("two", "one")
    assert answers(convert({"prompt": "q", "r1": "one", "r2": "two", "label": 2}, answers=["r1", "r2"])) == ("two", "one")
    assert answers(convert({"prompt": "q", "r": ["one", "two"], "label": 2}, answers=["r.0", "r.1"])) == ("two", "one")


def test_ties_and_no_preference_are_declared_and_counted_apart() -> None:
    labels = {"A": "first", "B": "second", "tie": "tie", 0.5: "tie", "unsure": "none"}
    found = [convert(LABELLED | {"label": each}, answers=["a", "b"], labels=labels) for each in ("tie", "0.50", "unsure", None)]
    assert [reason(each) for each in found] == ["label_tie", "label_tie", "no_preference", "missing_label"]


@pytest.mark.parametrize("label", [None, float("nan"), "", "  ", np.float64("nan")])
def test_a_row_without_a_label_is_counted(label: Any) -> None:
    assert reason(convert(LABELLED | {"label": label}, answers=["a", "b"])) == "missing_label"
    assert reason(convert(LABELLED, answers=["a", "b"])) == "missing_label"


@pytest.mark.parametrize("labels", [{0: "first", 1: "second"}, {"0": "first", "1.0": "second"}])
def test_two_answers_in_one_list(labels: dict[Any, str]) -> None:
    row = {"prompt": "q", "responses": ["one", {"text": "two"}], "best": 1}
    assert answers(convert(row, answers="responses", label="best", labels=labels)) == ("two", "one")
    assert reason(convert(row | {"responses": ["one", "two", "three"]}, answers="responses", label="best", labels=labels)) == (
        "not_two_answers"
    )


# The refusal of a source


@pytest.fixture
def prepared(tmp_path: Path, tokenizer: KeuralTokenizer) -> Any:
    def run(rows: list[dict[str, Any]], tokens: int = 512, **settings: Any) -> Prepared:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        adapter = settings.pop("adapter", "preference")
        source = SourceSpec(name="p", adapter=adapter, path="rows.jsonl", **settings)
        return prepare(DataSpec(sources=[source], sequence_length=tokens), "dpo", tmp_path, tokenizer, tmp_path / "out", 0)

    return run


def numbered(count: int, **fields: Any) -> list[dict[str, Any]]:
    """Rows that differ, with fields made from their numbers."""
    return [
        {"prompt": f"question {n}", "a": f"first answer {n}", "b": f"second one {n}", **{k: v(n) for k, v in fields.items()}}
        for n in range(count)
    ]


def test_labels_outside_the_declared_ones_refuse_the_source_with_all_values_and_how_to_declare_them(prepared: Any) -> None:
    rows = numbered(12, label=lambda n: ("x", 0, 1)[n % 3])
    with pytest.raises(UserError) as refused:
        prepared(rows, options={"answers": ["a", "b"]}, max_drop=1)
    message = str(refused.value)
    assert "label is 'x' (4 rows), label is 0 (4 rows)" in message
    assert "(beside label is 1 (4 rows))" in message
    assert "options: {labels: {'x': ..., '0': ..., '1': ...}} says what each means: first (a), second (b), tie or none" in message
    assert "rows.jsonl:1" in message
    pasted = message.partition("options: ")[2].partition(" says")[0]
    for meaning in ("tie", "first", "second"):
        pasted = pasted.replace("...", meaning, 1)
    found = prepared(rows, options={"answers": ["a", "b"], **yaml.safe_load(pasted)})
    assert (found.table[0].kept, found.table[0].drops) == (8, {"label_tie": 4})
    assert found.table[0].details == {"label_tie": {"label is 'x'": 4}}


def test_one_odd_value_among_many_refuses_the_source(prepared: Any) -> None:
    rows = numbered(30, label=lambda n: 0 if n == 29 else 1 + n % 2)
    with pytest.raises(UserError, match=r"label is 0 \(1 rows\), first rows.jsonl:30"):
        prepared(rows, options={"answers": ["a", "b"]})


def test_more_values_than_are_listed_are_counted(prepared: Any) -> None:
    with pytest.raises(UserError, match=r"and others \(8 rows\)"):
        prepared(numbered(20, label=lambda n: n / 8 + 2.0625), options={"answers": ["a", "b"]})


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"label": "x"}, "'label' has no effect without 'answers'"),
        ({"labels": {0: "first", 1: "second"}}, "'labels' has no effect without 'answers'"),
        ({"order": "best_first"}, "'order' has no effect without 'answers'"),
        ({"lower_is_better": True}, "'lower_is_better' has no effect without 'scores'"),
        ({"answers": ["a", "b"], "chosen": "a"}, "'chosen' has no effect beside 'answers'"),
        ({"answers": ["a", "b"], "scores": ["x", "y"], "label": "l"}, "'label' has no effect beside 'scores'"),
        ({"answers": "a", "order": "best_first", "scores": "x"}, "'scores' has no effect beside 'order'"),
        ({"prompt": "p", "prompt_text": "x"}, "'prompt_text' has no effect beside 'prompt'"),
        ({"pairs": "adjacent"}, "only all takes pairs of several"),
        ({"answers": ["a", "b"], "pairs": "all"}, "two answers give one pair"),
        ({"answers": ["a", "b", "c"]}, "more need scores or order"),
        ({"answers": ["a", "a"]}, "names a field twice"),
        ({"answers": ["a", "b"], "scores": ["x", "y", "z"]}, "a field for each of 2 answers"),
        ({"answers": ["a", "b"], "scores": "x"}, "a field for each of the answers"),
        ({"scores": "x"}, "two fields"),
        ({"answers": ["a", "b"], "labels": {0: "first", 1: "better"}}, "'better' is no meaning"),
        ({"answers": ["a", "b"], "labels": {0: "first", "0.0": "second"}}, "means first and second"),
        ({"answers": ["a", "b"], "labels": {0: "first"}}, "must say which value means second"),
        ({"answers": ["a", "b"], "labels": {"": "tie", 1: "first", 2: "second"}}, "says nothing"),
        ({"min_margin": 0}, "a number above 0"),
        ({"booleans": ["yes"]}, "two texts"),
    ],
)
def test_options_that_have_no_effect_or_contradict_each_other_are_refused(
    options: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=problem):
        open_source(SourceSpec(name="p", adapter="preference", path="rows.jsonl", options=options), tmp_path)


def test_a_refused_source_names_what_can_be_done(prepared: Any) -> None:
    with pytest.raises(UserError, match=r"several_answers .*options: \{pairs: all\} takes each chosen one"):
        prepared([SEVERAL | {"prompt": f"q{n}"} for n in range(3)])
    with pytest.raises(
        UserError, match=r"no label\); name the field in the option label, or fields with numbers in the option scores"
    ):
        prepared([SCORED | {"x": 1, "y": 2}], options={"answers": ["a", "b"]})


# Scores, ranks and lists

SCORED = {"prompt": "q", "a": "one", "b": "two"}


@pytest.mark.parametrize(("first", "second"), [(9, 1), ("9", "1"), (0.5, "-2"), (1e3, 999), (np.float32(2), np.int64(1))])
def test_the_higher_score_is_the_better_answer_unless_the_option_says_lower(first: Any, second: Any) -> None:
    row = SCORED | {"x": first, "y": second}
    assert answers(convert(row, answers=["a", "b"], scores=["x", "y"])) == ("one", "two")
    assert answers(convert(row, answers=["a", "b"], scores=["x", "y"], lower_is_better=True)) == ("two", "one")


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (1, 1.0, "score_tie"),
        (1, "1", "score_tie"),
        (1, None, "missing_ranking"),
        (1, float("nan"), "missing_ranking"),
        ("N/A", 3, "missing_ranking"),
        (1, "good", "undeclared_value"),
        (1, "4/5", "undeclared_value"),
        (1, "4,5", "undeclared_value"),
        (1, True, "undeclared_value"),
        (1, [2], "undeclared_value"),
        (1, float("inf"), "undeclared_value"),
        (3, 2.5, "small_margin"),
    ],
)
def test_scores_that_give_no_pair(first: Any, second: Any, expected: str) -> None:
    record = convert(SCORED | {"x": first, "y": second}, answers=["a", "b"], scores=["x", "y"], min_margin=1)
    assert reason(record) == expected


RANKED = {"prompt": "q", "completions": ["worst", "best", "middle"], "ratings": ["1", "5", 3]}


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("best_vs_worst", [("best", "worst")]),
        ("adjacent", [("best", "middle"), ("middle", "worst")]),
        ("all", [("best", "middle"), ("best", "worst"), ("middle", "worst")]),
    ],
)
@pytest.mark.parametrize(
    ("row", "options"),
    [
        (RANKED, {"answers": "completions", "scores": "ratings"}),
        (RANKED | {"ratings": [3, 1, "2"]}, {"answers": ["completions"], "scores": "ratings", "lower_is_better": True}),
        ({"prompt": "q", "list": ["best", "middle", "worst"]}, {"answers": "list", "order": "best_first"}),
        ({"prompt": "q", "list": ["worst", "middle", "best"]}, {"answers": "list", "order": "worst_first"}),
        (
            {"prompt": "q", "list": [{"text": "middle", "s": 2}, {"text": "best", "s": 3.5}, {"text": "worst", "s": "-1"}]},
            {"answers": "list", "scores": "s"},
        ),
        (
            {"prompt": "q", "list": {"reply": ["middle", "best", "worst"], "s": [2, 3, 1]}},
            {"answers": "list", "scores": "s", "content": "reply"},
        ),
        (
            {"prompt": "q", "list": json.dumps([{"response": text, "s": n} for n, text in enumerate(("worst", "middle", "best"))])},
            {"answers": "list", "scores": "s"},
        ),
        (
            {"prompt": "q", "x": "worst", "y": "middle", "z": "best", "sx": 1, "sy": 2, "sz": 3},
            {"answers": ["x", "y", "z"], "scores": ["sx", "sy", "sz"]},
        ),
        (
            {"prompt": "q", "list": [[ASKED, GOOD | {"content": text}] for text in ("middle", "worst", "best")], "s": [2, 1, 3]},
            {"answers": "list", "scores": "s"},
        ),
    ],
)  # fmt: skip
def test_ranked_answers_give_the_pairs_of_the_policy_each_weighted_by_their_number(
    row: dict[str, Any], options: dict[str, Any], policy: str, expected: list[tuple[str, str]]
) -> None:
    found = converted(row, pairs=policy, **options)
    assert [answers(each) for each in found] == expected
    assert {each.weight for each in found} == {1 / len(expected)}
    if policy == "best_vs_worst":
        assert [answers(each) for each in converted(row, **options)] == expected


def test_ties_and_unscored_answers_of_a_ranking_are_counted() -> None:
    row = {"prompt": "q", "list": ["a", "b", "c", "d"], "s": [1, 2, 2, None]}
    found = converted(row, answers="list", scores="s", pairs="all")
    assert [reason(each) if isinstance(each, Drop) else answers(each) for each in found] == ["score_tie", ("b", "a"), ("c", "a")]
    assert {(each.weight, each.notes) for each in found[1:]} == {(0.5, ("unranked_answer_left_out",))}
    assert reason(convert(row | {"s": [1, None, "N/A", ""]}, answers="list", scores="s")) == "missing_ranking"
    assert reason(convert(row | {"s": [1, 2, 3]}, answers="list", scores="s")) == "malformed_row"
    assert reason(convert(row | {"s": [1, 2, 3, "first"]}, answers="list", scores="s")) == "undeclared_value"
    assert reason(convert(row | {"s": [3, 3, 3, 3]}, answers="list", scores="s")) == "score_tie"


def test_scores_beside_answers_and_inside_them_must_agree() -> None:
    row = {"prompt": "q", "list": [{"text": "a", "s": 1}, {"text": "b", "s": 2}]}
    assert answers(convert(row | {"s": [1.0, "2"]}, answers="list", scores="s")) == ("b", "a")
    assert reason(convert(row | {"s": [2, 1]}, answers="list", scores="s")) == "fields_differ"


@given(st.lists(st.integers(0, 3), min_size=2, max_size=6), st.sampled_from(["best_vs_worst", "adjacent", "all"]))
def test_no_pair_of_a_ranking_prefers_a_lower_score(scores: list[int], policy: str) -> None:
    pairs = ranked_pairs(scores, policy)
    assert all(scores[better] >= scores[worse] for better, worse in pairs)
    assert (
        len(set(map(frozenset, pairs)))
        == len(pairs)
        == {"best_vs_worst": 1, "adjacent": len(scores) - 1}.get(policy, len(scores) * (len(scores) - 1) // 2)
    )


def test_items_of_a_list_that_no_name_takes_are_noted() -> None:
    row = {"prompt": "q", "list": ["one", "two", "three"], "label": 2}
    assert kept(convert(row, chosen="list.1", rejected="list.0")).notes == ("other_items_left_out",)
    assert kept(convert(row, answers=["list.0", "list.1"])).notes == ("other_items_left_out",)
    assert kept(convert(row | {"list": ["one", "two"]}, answers=["list.0", "list.1"])).notes == ()


SEVERAL = {"prompt": "q", "chosen": ["red", "blue"], "rejected": ["a table", "a chair", "a lamp"]}


def test_several_chosen_and_rejected_answers_are_counted_or_taken_each_with_each() -> None:
    record = convert(SEVERAL)
    assert (reason(record), record.detail) == ("several_answers", "chosen holds 2")  # type: ignore[union-attr]
    found = converted(SEVERAL, pairs="all")
    assert [answers(each) for each in found] == [(c, r) for c in SEVERAL["chosen"] for r in SEVERAL["rejected"]]
    assert {each.weight for each in found} == {1 / 6}
    chats = {"prompt": "q", "chosen": [[ASKED, GOOD]], "rejected": [[ASKED, BAD], [ASKED, BAD | {"content": "worse"}]]}
    assert [answers(each) for each in converted(chats, pairs="all")] == [("good", "bad"), ("good", "worse")]
    assert reason(convert(SEVERAL | {"rejected": []}, pairs="all")) == "missing_rejected"
    assert answers(convert({"prompt": "q", "chosen": "x", "rejected": "y"}, pairs="all")) == ("x", "y")


@pytest.mark.parametrize("names", SCORES)
@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((2, 1), None),
        (("2", 1.5), None),
        ((None, None), None),
        ((1, 2), "score_reversed"),
        ((1, "1.0"), "score_tie"),
        ((1, None), "missing_score"),
        ((float("nan"), 1), "missing_score"),
        (("high", "low"), "undeclared_value"),
        ((True, False), "undeclared_value"),
    ],
)
def test_scores_beside_chosen_and_rejected(names: tuple[str, str], scores: tuple[Any, Any], expected: str | None) -> None:
    row = {"prompt": "q", "chosen": "good", "rejected": "bad"} | dict(zip(names, scores, strict=True))
    record = convert(row)
    assert (answers(record) == ("good", "bad")) if expected is None else (reason(record) == expected)
    assert answers(convert(row, ignore=list(names))) == ("good", "bad")


def test_rewards_are_scores() -> None:
    row = {"prompt": "q", "chosen": "good", "rejected": "bad", "reward_chosen": -3.5, "reward_rejected": 1}
    assert reason(convert(row)) == "score_reversed"


def test_ranks_beside_chosen_and_rejected_and_a_margin() -> None:
    row = {"prompt": "q", "chosen": "good", "rejected": "bad", "rank_c": 1, "rank_r": 4}
    options = {"scores": ["rank_c", "rank_r"], "lower_is_better": True}
    assert answers(convert(row, **options)) == ("good", "bad")
    assert reason(convert(row, **options, min_margin=3.5)) == "small_margin"
    assert reason(convert({**row, "rank_r": None}, **options)) == "missing_score"
    assert reason(convert(row, min_margin=1)) == "missing_score", "no score says how much better it is"


# Prompt, system and what stands beside them


def test_two_prompts_that_differ_are_counted_unless_an_option_says_which() -> None:
    row = {"prompt": "You are a tutor.", "question": "What is 1+1?", "chosen": "2", "rejected": "3"}
    record = convert(row)
    assert (reason(record), record.detail) == ("fields_differ", "prompt, question")  # type: ignore[union-attr]
    assert pair(convert(row, prompt="question"))[0] == [("user", "What is 1+1?")]
    assert pair(convert(row, prompt=["prompt", "question"]))[0] == [("user", "You are a tutor.\nWhat is 1+1?")]
    assert pair(convert(row, ignore=["prompt"]))[0] == [("user", "What is 1+1?")]
    assert pair(convert(row | {"prompt": " What is\n1+1? "}))[0] == [("user", " What is\n1+1?")]
    assert pair(convert(row | {"prompt": None}))[0] == [("user", "What is 1+1?")]


def test_an_input_belongs_to_an_instruction_and_is_the_prompt_without_one() -> None:
    sides = {"chosen": "good", "rejected": "bad"}
    assert pair(convert({"instruction": "  add", "input": "1, 2", **sides}))[0] == [("user", "  add\n\n1, 2")]
    assert pair(convert({"input": "1, 2", **sides}))[0] == [("user", "1, 2")]
    assert pair(convert({"prompt": "add", "input": "<noinput>", **sides}))[0] == [("user", "add")]
    left = convert({"instruction": "add", "input": "none", **sides})
    assert (pair(left)[0], left.notes) == ([("user", "add")], ("input_left_out",))
    assert reason(convert({"prompt": "add", "input": "1, 2", **sides})) == "fields_differ"
    assert pair(convert({"prompt": "add", "input": "1, 2", **sides}, input="input"))[0] == [("user", "add\n\n1, 2")]
    assert reason(convert({"instruction": "add", "input": [1, 2], **sides})) == "input_is_not_text"
    assert reason(convert({"prompt": "add", "input": [1, 2], **sides})) == "input_is_not_text"
    assert reason(convert({"prompt": [ASKED], "input": "x", **sides}, input="input")) == "fields_differ"


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


CHATS = {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": [system("s"), ASKED], **CHATS}, "s"),
        ({"prompt": "q", "system": "s", **CHATS}, "s"),
        ({"chosen": [system("s"), ASKED, GOOD], "rejected": [system("s"), ASKED, BAD]}, "s"),
        ({"prompt": "q", "system": "s\n", "chosen": [system("s"), ASKED, GOOD], "rejected": [system("s"), ASKED, BAD]}, "s"),
        ({"system": "s", "chosen": [system("t"), ASKED, GOOD], "rejected": [system("t"), ASKED, BAD]}, "system_differs"),
        ({"system": "s", "prompt": [system("t"), ASKED], **CHATS}, "system_differs"),
        (
            {"prompt": [system("s"), ASKED], "chosen": [system("t"), ASKED, GOOD], "rejected": [system("t"), ASKED, BAD]},
            "system_differs",
        ),
        ({"chosen": [system("s"), ASKED, GOOD], "rejected": [system("t"), ASKED, BAD]}, "history_differs"),
        ({"chosen": [system("s"), ASKED, GOOD], "rejected": [ASKED, BAD]}, "history_differs"),
        ({"prompt": "q", "system": ["s"], **CHATS}, "system_is_not_text"),
        ({"prompt": "q", "messages": [system("s"), ASKED, GOOD], **CHATS}, "s"),
        ({"prompt": "q", "messages": [system("s"), ASKED], "chosen": "good", "rejected": "bad"}, "s"),
        ({"prompt": "other", "messages": [ASKED], "chosen": "good", "rejected": "bad"}, "fields_differ"),
        ({"prompt": "other", **CHATS}, "history_differs"),
    ],
)  # fmt: skip
def test_a_system_turn_is_kept_wherever_it_stands_and_two_are_counted(row: dict[str, Any], expected: str) -> None:
    record = convert(row)
    if isinstance(record, Drop):
        assert reason(record) == expected
    else:
        assert pair(record) == ([("system", expected), ("user", "q")], "good", "bad")


def test_tools_of_a_row_stand_in_the_system_turn() -> None:
    tool = {"name": "wind", "parameters": {"type": "object"}}
    row = {"prompt": "q", "chosen": "good", "rejected": "bad", "tools": json.dumps([{"type": "function", "function": tool}])}
    assert kept(convert(row)).prompt == tuple(with_tools([kept(convert(row | {"tools": None})).prompt[0]], [tool]))
    assert reason(convert(row | {"tools": ["wind"]})) == "malformed_tools"
    assert len(kept(convert(row, ignore=["tools"])).prompt) == 1


def test_what_rows_say_of_training_is_honoured_or_counted() -> None:
    row: dict[str, Any] = {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}
    assert reason(convert(row | {"weight": 0})) == "not_trained"
    assert reason(convert(row | {"chosen": [ASKED, GOOD | {"weight": 0}]})) == "not_trained"
    assert reason(convert({"prompt": "q", "chosen": "good", "rejected": "bad", "label": False})) == "label_false"
    assert reason(convert(row | {"chosen": [ASKED, GOOD | {"reasoning_content": "hm"}]})) == "has_reasoning"
    thought = row | {"chosen": [ASKED, GOOD | {"reasoning_content": "hm"}]}
    assert answers(convert(thought, ignore=["reasoning_content"])) == ("good", "bad")
    history = [ASKED, {"role": "assistant", "content": "a", "train": True}, ASKED]
    noted = convert({"chosen": [*history, GOOD], "rejected": [*history, BAD]})
    assert kept(noted).notes == ("history_not_trained",)
    assert [turn.trained for turn in kept(noted).prompt] == [None] * 3


# Shapes


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"prompt": json.dumps([ASKED]), "chosen": json.dumps([GOOD]), "rejected": json.dumps(BAD)}, {}),
        ({"chosen": json.dumps([ASKED, GOOD]), "rejected": json.dumps([ASKED, BAD])}, {}),
        ({"chosen": {"role": ["user", "assistant"], "content": ["q", "good"]}, "rejected": [ASKED, BAD]}, {}),
        ({"prompt": "q", "chosen": {"text": "good"}, "rejected": {"response": "bad"}}, {}),
        ({"prompt": "q", "chosen": {"t": "good"}, "rejected": {"t": "bad"}}, {"content": "t"}),
        ({"prompt": "q", "chosen": ["good"], "rejected": [{"text": "bad"}]}, {}),
        (
            {"chosen": [{"role": "asker", "content": "q"}, GOOD], "rejected": [{"role": "asker", "content": "q"}, BAD]},
            {"roles": {"asker": "user"}},
        ),
        (
            {"prompt": "q", "chosen": {"who": "bot", "said": "good"}, "rejected": {"who": "bot", "said": "bad"}},
            {"role": "who", "content": "said"},
        ),
        ({"chosen": "good", "rejected": "bad"}, {"prompt_text": "q"}),
        ({"prompt": "q", "yes": True, "no": False}, {"chosen": "yes", "rejected": "no", "booleans": ["good", "bad"]}),
        ({"turns": {"asked": "q"}, "chosen": "good", "rejected": "bad"}, {"prompt": "turns.asked"}),
    ],
)
def test_shapes_of_one_pair(row: dict[str, Any], options: dict[str, Any]) -> None:
    assert pair(convert(row, **options)) == ([("user", "q")], "good", "bad")


def test_a_fixed_prompt_and_one_of_the_row_are_two() -> None:
    sides = {"chosen": "good", "rejected": "bad"}
    assert reason(convert({"question": "other", **sides}, prompt_text="q")) == "fields_differ"
    assert pair(convert({"question": "q", **sides}, prompt_text="q"))[0] == [("user", "q")]
    assert pair(convert({"question": "other", **sides}, prompt_text="q", ignore=["question"]))[0] == [("user", "q")]
    assert reason(convert(CHATS, prompt_text="r")) == "history_differs"


def test_answers_may_follow_the_result_of_a_tool(prepared: Any, tokenizer: KeuralTokenizer) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "wind", "arguments": {}}}]}
    turns = [ASKED, call, {"role": "tool", "content": "3"}]
    row = {"chosen": [*turns, GOOD], "rejected": [*turns, BAD], "tools": [{"name": "wind"}]}
    assert [role for role, _ in pair(convert(row))[0]] == ["system", "user", "assistant", "tool"]
    store = TokenStore.open(prepared([row], max_drop=0).train)
    trained = [store.sequence(side)[store.loss_mask(side) == 1].tolist() for side in (0, 1)]
    assert [tokenizer.decode(ids[:-1]) for ids in trained] == ["good", "bad"], "no call and no result, only the answers"
    assert reason(convert({"chosen": [ASKED, call, GOOD], "rejected": [ASKED, call, BAD]})) == "prompt_does_not_end_with_user"


def test_an_answer_that_is_json_stays_text() -> None:
    row = {"prompt": "q", "chosen": '[{"name": "oak"}]', "rejected": '["a", "b"]'}
    assert answers(convert(row)) == ('[{"name": "oak"}]', '["a", "b"]')


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "chosen": True, "rejected": "bad"}, "chosen_is_not_text"),
        ({"prompt": "q", "chosen": float("nan"), "rejected": "bad"}, "missing_chosen"),
        ({"prompt": "q", "chosen": {"text": "good", "response": "other"}, "rejected": "bad"}, "fields_differ"),
        ({"prompt": "q", "chosen": {"score": 1}, "rejected": "bad"}, "missing_chosen"),
        ({"prompt": {"text": "q"}, "chosen": "good", "rejected": "bad"}, "prompt_is_not_text"),
        ({"prompt": ["q"], "chosen": "good", "rejected": "bad"}, "prompt_is_not_text"),
        ({"chosen": "good", "rejected": "bad"}, "missing_prompt"),
        ({"prompt": "q", "completion": "good", "label": True}, "wrong_schema"),
        ({"prompt": "q", "chosen": "good"}, "missing_rejected"),
        ({"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "prompt": [ASKED, GOOD, ASKED]}, "history_differs"),
    ],
)
def test_rows_that_give_no_pair(row: dict[str, Any], expected: str) -> None:
    assert reason(convert(row)) == expected


def test_kto_rows_are_no_pairs(prepared: Any) -> None:
    rows = [{"prompt": "q", "completion": text, "label": good} for text, good in (("good", True), ("bad", False))]
    with pytest.raises(UserError, match="adapter kto trains the good ones"):
        prepared(rows)


def test_columns_of_lists_give_the_same_pairs_as_lines(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "list": [{"text": "a", "s": 1.0}, {"text": "b", "s": 2.0}], "label": None},
        {"prompt": "r", "list": [{"text": "c", "s": 3.0}, {"text": "d", "s": None}, {"text": "e", "s": 1.0}], "label": None},
    ]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"answers": "list", "scores": "s", "pairs": "all"}
    found = {}
    for suffix in ("parquet", "jsonl"):
        source = open_source(SourceSpec(name="s", adapter="preference", path=f"rows.{suffix}", options=options), tmp_path)
        found[suffix] = [(answers(record), kept(record).notes) for record in source.read(0)]
    assert found["parquet"] == found["jsonl"] == [(("b", "a"), ()), (("c", "e"), ("unranked_answer_left_out",))]


def test_the_store_has_the_weight_of_every_pair(prepared: Any) -> None:
    rows = [RANKED | {"prompt": f"q{n}"} for n in range(3)] + [
        RANKED | {"prompt": "r", "completions": ["a", "b"], "ratings": [1, 2]}
    ]
    found = prepared(rows, options={"answers": "completions", "scores": "ratings", "pairs": "all"})
    weights = TokenStore.open(found.train).pair_weights
    assert weights is not None
    assert weights.tolist() == pytest.approx([1 / 3] * 9 + [1])
    best = prepared(rows, options={"answers": "completions", "scores": "ratings"})
    assert TokenStore.open(best.train).pair_weights is None


def test_pairs_of_one_row_are_no_duplicates_by_its_id(prepared: Any) -> None:
    rows = [RANKED | {"prompt": f"q{n}", "id": n} for n in range(3)]
    options = {"answers": "completions", "scores": "ratings", "pairs": "all"}
    assert prepared(rows, options=options, id_field="id").table[0].kept == 9


def test_fields_that_nothing_reads_are_listed(prepared: Any) -> None:
    rows = [row | {"note": "x", "question_id": 7} for row in numbered(3, label=lambda n: 1)]
    assert prepared(rows, options={"answers": ["a", "b"]}).table[0].not_read == ("note", "question_id")
    answered = [{"prompt": f"q{n}", "list": [{"text": f"a{n}", "s": 1, "model": "m"}, {"text": "b", "s": 2}]} for n in range(3)]
    assert prepared(answered, options={"answers": "list", "scores": "s"}).table[0].not_read == ("list.model",)


@pytest.mark.parametrize("name", sorted(PREFERENCES))
def test_the_example_of_an_adapter_is_a_row_that_it_reads(name: str) -> None:
    adapter = PREFERENCES[name]
    assert kept(adapter(adapter.example, SourceSpec(name="s", adapter=name), "file:1")).notes == ()


def test_keys_of_labels() -> None:
    assert [label_key(value) for value in (1, 1.0, "1 ", "01", "1e0", 0.5, ".5", True, "TRUE", 10**30)] == [
        *["1"] * 5, "0.5", "0.5", "true", "true", str(int(1e30))
    ]  # fmt: skip
    assert number_of(" 1.50 ", "x") == 1.5


# Whatever rows hold

ODD = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, 2, 3, 0.0, 1.0, 0.5, "0", "2.0", "tie", "x", "", " ", float("nan"), float("inf")])
    | st.lists(st.just("x"), max_size=2)
    | st.just({"x": "y"})
)
LABEL_OPTIONS: list[dict[Any, str]] = [
    {},
    {0: "first", 1: "second"},
    {"1": "second", "2": "first", "tie": "tie"},
    {"true": "first", "false": "second", "0.5": "none"},
]


@st.composite
def odd_rows(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row with several answers in which every field that carries meaning may be there, mostly with a fitting value; and its
    options.
    """

    def mostly(fitting: st.SearchStrategy[Any]) -> Any:
        return draw(ODD) if draw(st.integers(1, 30)) == 1 else draw(fitting)

    def sometimes(name: str, fitting: st.SearchStrategy[Any], one_in: int = 4) -> None:
        if draw(st.integers(1, one_in)) == 1:
            row[name] = mostly(fitting)

    def side(text: str) -> Any:
        if not chats:
            return text
        first = [system(inside)] if inside else []
        return [*first, {"role": "user", "content": "askedx"}, {"role": "assistant", "content": text}]

    row: dict[str, Any] = {}
    options: dict[str, Any] = {}
    chats, inside = draw(st.integers(1, 4)) == 1, draw(st.sampled_from([""] * 5 + ["systemx", "elsex"]))
    prompts = draw(st.lists(st.sampled_from(["prompt", "question", "messages"]), max_size=2, unique=True))
    for name in prompts or ["prompt"]:
        text = draw(st.sampled_from(["askedx"] * 12 + ["otherx"]))
        turn = {"role": "user", "content": text}
        before = [system(draw(st.sampled_from([inside, "elsex"])))] if draw(st.integers(1, 4)) == 1 else []
        shape = st.just([*before, turn] if name == "messages" else text)
        row[name] = mostly(shape)
    sometimes("input", st.sampled_from(["inputx", "<noinput>"]), 6)
    sometimes("system", st.just("systemx"))
    sometimes("tools", st.just([{"name": "toolx"}]))
    sometimes("weight", st.sampled_from([0, 1]), 8)
    sometimes("train", st.booleans(), 8)
    sometimes("kto_tag", st.booleans(), 8)
    mode = draw(st.sampled_from(["sides", "label", "scores", "list"]))
    numbers = draw(st.permutations([1, 2, "3", 2.5, 1]))
    if mode == "sides":
        row |= {"chosen": mostly(st.just(side("onex"))), "rejected": mostly(st.just(side("twox")))}
        if draw(st.booleans()):
            row |= {name: mostly(st.just(numbers[place])) for place, name in enumerate(draw(st.sampled_from(SCORES)))}
    elif mode == "list":
        count = draw(st.integers(2, 4))
        row |= {"list": mostly(st.just([side(f"item{n}x") for n in range(count)]))}
        row["scores"] = mostly(st.just([mostly(st.just(number)) for number in numbers[:count]]))
        options |= {"answers": "list", "scores": "scores", "pairs": draw(st.sampled_from(["best_vs_worst", "adjacent", "all"]))}
    else:
        row |= {"a": mostly(st.just(side("onex"))), "b": mostly(st.just(side("twox")))}
        options["answers"] = ["a", "b"]
        if mode == "label":
            labels = draw(st.sampled_from(LABEL_OPTIONS))
            options |= {"labels": labels} if labels else {}
            row["label"] = draw(ODD) if draw(st.integers(1, 4)) == 1 else draw(st.sampled_from(list(labels) or [1, 2, 1.0, "2"]))
        else:
            row |= {"x": mostly(st.just(numbers[0])), "y": mostly(st.just(numbers[1]))}
            options["scores"] = ["x", "y"]
    if mode != "label" and mode != "sides" and draw(st.integers(1, 3)) == 1:
        options["lower_is_better"] = True
    return row, options


def same(value: Any, other: Any) -> bool:
    """Whether two values of a label are the same, written apart from the reader."""

    def plain(each: Any) -> Any:
        if isinstance(each, bool):
            return str(each).lower()
        try:
            return float(each)
        except (TypeError, ValueError):
            return str(each).strip().lower()

    return bool(plain(value) == plain(other))


def text_in(answer: Any) -> str:
    """The text of an answer: itself, or the last or only item of a list."""
    last = answer[-1] if isinstance(answer, list) else answer
    return str(last["content"] if isinstance(last, dict) else last)


def check_honoured(record: PreferencePair, row: dict[str, Any], options: dict[str, Any]) -> None:
    """Assert that a pair has all that its row says, the right way round."""
    whole = "\n".join(turn.text for turn in record.prompt)
    said_as = (record.chosen, record.rejected)
    if "list" in row:
        better, worse = (float(row["scores"][int(text[4])]) for text in said_as)
        assert (better < worse) if options.get("lower_is_better") else (better > worse)
        unranked = any(score is None or score != score or score in ("", " ") for score in row["scores"])
        assert record.notes == (("unranked_answer_left_out",) if unranked else ())
    elif "label" in row:
        labels = options.get("labels", {1: "first", 2: "second"})
        meanings = {meaning for value, meaning in labels.items() if same(value, row["label"])}
        assert said_as == tuple(text_in(row[name]) for name in ("ab" if meanings == {"first"} else "ba"))
        assert meanings in ({"first"}, {"second"})
    elif "scores" in options:
        first = (float(row["x"]) > float(row["y"])) != bool(options.get("lower_is_better"))
        assert said_as == tuple(text_in(row[name]) for name in ("ab" if first else "ba"))
    else:
        assert said_as == (text_in(row["chosen"]), text_in(row["rejected"]))
        for names in SCORES:
            scores = [row[name] for name in names if row.get(name) not in (None, "", " ") and row[name] == row[name]]
            assert len(scores) in (0, 2)
            assert not scores or float(scores[0]) > float(scores[1])
    for name in ("prompt", "question", "instruction", "input"):
        if isinstance(row.get(name), str) and row[name].strip() and row[name] != "<noinput>":
            assert row[name].strip() in whole, name
    assert [turn.role for turn in record.prompt if turn.role != "system"] == ["user"]
    said = json.dumps([row.get(name) for name in ("messages", "chosen", "rejected", "a", "b", "list")])
    for text in ("elsex", "systemx"):
        assert (text in whole) == (text in said or row.get("system") == text)
    assert ("toolx" in whole) == (row.get("tools") == [{"name": "toolx"}])
    assert all(value in (None, "", " ", True, 1, 1.0) for value in (row.get("weight"), row.get("train")))
    assert row.get("kto_tag") is not False


@pytest.mark.hypothesis
def test_every_field_that_carries_meaning_is_honoured_or_the_row_is_counted() -> None:
    became: Counter[str] = Counter()

    @examples(150)
    @given(odd_rows())
    def run(case: tuple[dict[str, Any], dict[str, Any]]) -> None:
        records = converted(case[0], **case[1])
        assert records
        for record in records:
            became[type(record).__name__] += 1
            if isinstance(record, Drop):
                assert reason_of(record.reason), record.reason
            else:
                check_honoured(record, *case)
        weights = [record.weight for record in records if isinstance(record, PreferencePair)]
        assert sum(weights) <= 1 + 1e-9

    run()
    assert min(became["Drop"], became["PreferencePair"]) > 40, became


# Answers that are objects


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"train": False}, "not_trained"),
        ({"weight": 0}, "not_trained"),
        ({"reasoning": "hm"}, "has_reasoning"),
        ({"weight": 0.5}, "undeclared_value"),
        ({"tool_calls": [{"function": {"name": "", "arguments": "{}"}}]}, "malformed_tool_call"),
    ],
)
@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize("shape", [{}, {"role": "assistant"}])
def test_an_answer_without_a_role_means_what_a_turn_means(
    extra: dict[str, Any], expected: str, side: str, shape: dict[str, str]
) -> None:
    row = {"prompt": "q", "chosen": {"content": "a", **shape}, "rejected": {"content": "b", **shape}}
    assert reason(convert(row | {side: row[side] | extra})) == expected


def test_calls_of_an_answer_without_a_role_are_trained() -> None:
    chosen = {"content": "", "tool_calls": [{"function": {"name": "wind", "arguments": "{}"}}]}
    assert '"name": "wind"' in answers(convert({"prompt": "q", "chosen": chosen, "rejected": {"content": "b"}}))[0]


def test_fields_of_answers_are_listed_where_nobody_reads_them() -> None:
    use = FieldUse(ADAPTERS["preference"], SourceSpec(name="s", adapter="preference"))
    use.look({"prompt": "q", "chosen": {"text": "a", "score": 1}, "rejected": {"text": "b", "score": 9}})
    assert use.unread == {"chosen.score", "rejected.score"}


@pytest.mark.parametrize(
    "options",
    [{"prompt": "a", "answers": ["a", "b"]}, {"prompt": "chosen"}, {"chosen": "rejected"}, {"prompt": ["q", "x"], "rejected": "x"}],
)
def test_a_field_is_not_the_prompt_and_an_answer(options: dict[str, Any]) -> None:
    check = ADAPTERS["preference"].check
    assert check is not None
    assert "is named as two of prompt and answers" in str(check(SourceSpec(name="s", adapter="preference", options=options)))
