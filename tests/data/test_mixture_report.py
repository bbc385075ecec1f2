"""The mixture report adds up, by source and by language, planned and as prepared."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keural.data.prepare import prepare
from keural.recipe import DataSpec, SourceSpec
from keural.tokenizer import KeuralTokenizer

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


def test_shares_of_prepared_pairs_are_of_pairs(keural: Keural, write: Any, data_dir: Path, tokenizer: KeuralTokenizer) -> None:
    """Three long pairs and one short one: three quarters, however many tokens they have."""
    rows = [{"prompt": f"q{n}", "chosen": f"a long answer {n} " * 9, "rejected": f"no {n}"} for n in range(3)]
    long = write("long.jsonl", "".join(json.dumps(row) + "\n" for row in rows), "preference", name="long", language="en")
    short = write("short.jsonl", json.dumps({"prompt": "q", "chosen": "네", "rejected": "아"}), "preference", name="short")
    spec = DataSpec(sources=[long, short], sequence_length=256)
    prepared = prepare(spec, "dpo", data_dir, tokenizer, data_dir.with_name("out"), 1)
    code, printed, complaint = keural("data", "stats", prepared.train.parent, "--json")
    assert code == 0, complaint
    (report,) = json.loads(printed).values()
    assert (report["basis"], report["total"]) == ("records", 4)
    assert [row["share"] for row in report["rows"]] == [0.75, 0.25]


def test_the_language_of_a_set_known_by_name_is_counted(
    keural: Keural, write: Any, data_dir: Path, tokenizer: KeuralTokenizer
) -> None:
    source: SourceSpec = write("a.txt", "CHAPTER I\n\nIt rained.\n", "pg19")
    prepared = prepare(DataSpec(sources=[source], sequence_length=64), "next_token", data_dir, tokenizer, data_dir / "out", 1)
    assert prepared.table[0].language == "en"
    _, printed, _ = keural("data", "stats", prepared.train.parent, "--json")
    (report,) = json.loads(printed).values()
    assert (report["basis"], set(report["languages"])) == ("tokens", {"en"})
