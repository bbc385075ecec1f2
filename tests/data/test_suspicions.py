"""What is unusual in a source is said in a line, and no line is said of a usual one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keural.data.prepare import prepare
from keural.data.source_counts import SourceRow
from keural.errors import UserError
from keural.recipe import DataSpec, Objective, SourceSpec
from keural.tokenizer import KeuralTokenizer

Prepare = Callable[..., SourceRow]


@pytest.fixture
def table_row(tmp_path: Path, tokenizer: KeuralTokenizer) -> Prepare:
    """The row of the table of a source."""

    def run(adapter: str, rows: list[dict[str, Any]], **settings: Any) -> SourceRow:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = SourceSpec(name="s", adapter=adapter, path="rows.jsonl", **settings)
        objective: Objective = "dpo" if adapter == "preference" else "sft"
        found = prepare(DataSpec(sources=[source], sequence_length=512), objective, tmp_path, tokenizer, tmp_path / "out", 0)
        return found.table[0]

    return run


def pairs(count: int, **fields: Callable[[int], Any]) -> list[dict[str, Any]]:
    """Pairs of answers of different lengths, by turns the first and the second longer; with more or other fields."""
    rows = [
        {"prompt": f"question {n}", "a": f"answer {n}" + " and more" * (n % 2), "b": f"another {n}" + " and on" * (1 - n % 2)}
        for n in range(count)
    ]
    return [row | {name: make(n) for name, make in fields.items()} for n, row in enumerate(rows)]


LABELLED = {"answers": ["a", "b"]}
SIDES = {"chosen": "a", "rejected": "b"}


def test_a_usual_source_is_not_suspected(table_row: Prepare) -> None:
    row = table_row("preference", pairs(40, label=lambda n: 1 + n // 2 % 2), options=LABELLED)
    assert (row.kept, row.suspicions) == (40, None)


def test_labels_that_all_say_the_same(table_row: Prepare) -> None:
    row = table_row("preference", pairs(12, label=lambda n: 2), options=LABELLED)
    assert row.suspicions == ("all 12 labels say the same: label is 2",)
    scored = table_row(
        "preference", pairs(12, x=lambda n: n + 1, y=lambda n: 0), options={"answers": ["a", "b"], "scores": ["x", "y"]}
    )
    assert scored.suspicions == ("all 12 labels say the same: a is the better",)
    good = [{"prompt": f"q{n}", "completion": f"a{n}" * (n + 1), "label": n != 3} for n in range(12)]
    assert table_row("kto", good).suspicions is None
    assert table_row("kto", [row | {"label": True} for row in good]).suspicions == ("all 12 labels say the same: label is True",)


def test_exactly_half_dropped_for_one_reason(table_row: Prepare) -> None:
    rows = pairs(12, b=lambda n: f"another {n} and on" if n % 2 else f"answer {n}")
    row = table_row("preference", rows, options=SIDES)
    assert row.suspicions == (
        "exactly half of the 12 rows are dropped for one reason, chosen_equals_rejected",
        "chosen and rejected are the same in 50% of the rows",
    )
    good = [{"prompt": f"q{n}", "completion": f"a{n}" * (n + 1), "label": n % 2 == 0} for n in range(12)]
    assert table_row("kto", good).suspicions is None, "each prompt may well have a good and a bad answer"


@pytest.mark.parametrize(("adapter", "field"), [("qa", "answer"), ("alpaca", "output")])
def test_answers_of_one_length(adapter: str, field: str, table_row: Prepare) -> None:
    name = {"qa": "question", "alpaca": "instruction"}[adapter]
    rows = [{name: f"question {n}", field: f"cut here {n:02}"} for n in range(12)]
    assert table_row(adapter, rows).suspicions == ("every answer has 11 characters; they may be cut",)
    letters = [row | {field: "ABCD"[n % 4]} for n, row in enumerate(rows)]
    assert table_row(adapter, letters).suspicions is None, "choices are letters"


def test_chosen_answers_that_are_always_longer_or_mostly_shorter(table_row: Prepare) -> None:
    row = table_row("preference", pairs(24, a=lambda n: f"good {n} " * 5), options=SIDES)
    assert row.suspicions == ("the chosen answer is the longer one in all 24 pairs",)
    swapped = {"chosen": "b", "rejected": "a"}
    row = table_row("preference", pairs(24, a=lambda n: f"good {n} " * (5 if n % 8 else 1)), options=swapped)
    assert row.suspicions == ("the chosen answer is the shorter one in 88% of 24 pairs; are they the right way round?",)


def test_scores_and_copies_that_contradict(table_row: Prepare) -> None:
    scored = pairs(20, score_chosen=lambda n: 1, score_rejected=lambda n: 2 if n < 6 else 0)
    assert table_row("preference", scored, options=SIDES).suspicions == (
        "the scores of 30% of the rows prefer the rejected answer; see option lower_is_better",
    )
    both = pairs(20) + [row | {"a": row["b"], "b": row["a"]} for row in pairs(20)[:5]]
    assert table_row("preference", both, options=SIDES).suspicions == (
        "20% of the rows are pairs that are there with their answers the other way round, too",
    )


def test_few_rows_say_nothing(table_row: Prepare) -> None:
    assert table_row("preference", pairs(9, label=lambda n: 1), options=LABELLED).suspicions is None


def test_what_is_noticed_of_a_copy_with_its_labels_swapped(table_row: Prepare, tmp_path: Path, tokenizer: KeuralTokenizer) -> None:
    """Scores and the right copy beside it refuse it, lengths warn of it; labels alone that are wrong in every row say nothing."""
    scores = {"score_chosen": lambda n: 1, "score_rejected": lambda n: 2}
    with pytest.raises(UserError, match="score_reversed"):
        table_row("preference", pairs(20, **scores), options=SIDES)
    right, wrong = pairs(20, label=lambda n: 1 + n // 2 % 2), pairs(20, label=lambda n: 2 - n // 2 % 2)
    assert table_row("preference", wrong, options=LABELLED).suspicions is None
    for name, rows in (("right", right), ("wrong", wrong)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [SourceSpec(name=n, adapter="preference", path=f"{n}.jsonl", options=LABELLED) for n in ("right", "wrong")]
    for held in ([], sources[:1]):
        spec = DataSpec(sources=sources[len(held) :], heldout_sources=held, sequence_length=512)
        with pytest.raises(UserError, match=r"'wrong'.*swapped_pair"):
            prepare(spec, "dpo", tmp_path, tokenizer, tmp_path / "out", 0)
