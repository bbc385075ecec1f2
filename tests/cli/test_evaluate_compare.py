"""`keural evaluate compare` on kept results."""

import json
import re
from pathlib import Path

import pytest

from tests.conftest import Keural
from tests.evaluate.comparison.test_chosen import keep


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for name, right in (("sft-1", 2), ("dpo-1", 19)):
        keep(tmp_path / "run" / "results", name, right)
    keep(tmp_path / "run" / "results", "sft-1", 5, task="arc_challenge")
    keep(tmp_path / "run" / "results", "dpo-1", 5, task="arc_challenge", n=30)
    keep(tmp_path / "run" / "results", "dpo-1", 5, task="mmlu")
    return tmp_path / "run"


def test_a_table_says_what_changed_and_what_was_left_out(keural: Keural, run: Path) -> None:
    code, out, err = keural("evaluate", "compare", run / "sft-1", run / "dpo-1", "--json", run / "out.json")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 130
    scores, grounds = [re.split(r"\s*│\s*", line.strip(" │")) for line in out.splitlines() if "kobest_copa" in line]
    assert scores[:5] == ["kobest_copa", "20", "0.100", "0.950", "+0.850"]
    assert grounds == ["kobest_copa", "17/0", "< 0.001", "< 0.001", "0.308", "better"]
    assert "arc_challenge: 10 items that only B has are left out" in err
    assert "only B has mmlu" in err
    told = json.loads((run / "out.json").read_text())
    assert (told["before"], told["after"]) == (str(run / "sft-1"), str(run / "dpo-1"))
    assert told["tasks"]["kobest_copa"]["gained"] == 17
    assert told["tasks"]["arc_challenge"]["only_after"] == 10


def test_other_ways_of_asking_are_said(keural: Keural, run: Path) -> None:
    keep(run / "results", "chatty", 12, prompting="chat")
    code, _, err = keural("evaluate", "compare", run / "sft-1", run / "chatty")
    assert code == 0
    assert "not asked alike: A bos, stored, transformers; B chat, stored, transformers" in err


@pytest.mark.parametrize(
    ("second", "words"),
    [("sft-7", "has no results of 'sft-7'"), ("other", "measured differently"), ("mmlu-only", "no task is in both")],
)
def test_what_cannot_be_compared_is_one_line(keural: Keural, run: Path, second: str, words: str) -> None:
    keep(run / "results", "other", 3, digest="e" * 64)
    keep(run / "results", "mmlu-only", 3, task="xnli_ko")
    code, out, err = keural("evaluate", "compare", run / "sft-1", run / second)
    assert (code, out) == (2, "")
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert keural("evaluate", "compare", run / "sft-1", run / "dpo-1", "--json", run)[0] == 2
