"""The mixture report adds up, by source and by language, planned and as prepared."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "keural-14b-published"
Keural = Callable[..., tuple[int, str, str]]


def test_the_published_recipe_has_the_published_mixture(keural: Keural, tmp_path: Path) -> None:
    code, printed, complaint = keural("data", "stats", RECIPE, "--json", "--out", tmp_path / "none")
    assert code == 0, complaint
    sft, dpo = (json.loads(printed)[stage] for stage in ("sft-3", "dpo-2"))
    assert (sft["state"], sft["basis"], sft["total"], dpo["total"]) == ("planned", "records", 2_351_212, 485_793)
    assert sft["languages"]["en"] == {"amount": 1_897_687, "share": pytest.approx(0.807, abs=0.0005)}
    assert sft["languages"]["ko"] == {"amount": 453_525, "share": pytest.approx(0.193, abs=0.0005)}
    assert dpo["languages"]["en"] == {"amount": 281_623, "share": pytest.approx(0.580, abs=0.0005)}
    for stage in json.loads(printed).values():
        assert stage["total"] is None or sum(row["share"] for row in stage["rows"]) == pytest.approx(1)


def test_the_table_is_markdown_and_notes_stand_where_no_amount_is_stated(keural: Keural, tmp_path: Path) -> None:
    code, printed, _ = keural("data", "stats", RECIPE, "--out", tmp_path / "none")
    assert code == 0
    assert "2,351,212 records: en 1,897,687 (80.7%), ko 453,525 (19.3%)" in printed
    assert "the shard card 69.5B" in printed
