"""Every published set's adapter on rows written for it in the documented schema (`rows/NAME.yaml`), known defects included."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import yaml

from keural.data.adapters import ADAPTERS, aihub, corpora, published
from keural.data.field_use import FieldUse
from keural.data.licenses import flags_of, license_of
from keural.data.records import Conversation, Document, Drop, PreferencePair
from keural.data.sources import open_source
from keural.recipe import SourceSpec

ROWS = Path(__file__).with_name("rows")
NAMES = sorted({*published.ADAPTERS, *aihub.ADAPTERS, *corpora.ADAPTERS, "hh_rlhf"})
CASES = [(name, number) for name in NAMES for number in range(len(yaml.safe_load((ROWS / f"{name}.yaml").read_text())))]


def plain(record: Any) -> Any:
    """A record as the fixtures write it."""
    if isinstance(record, Drop):
        return record.reason
    if isinstance(record, Document):
        return record.text
    if isinstance(record, Conversation):
        return [[turn.role, turn.content] for turn in record.messages]
    assert isinstance(record, PreferencePair)
    prompt = [[turn.role, turn.content] for turn in record.prompt]
    return {"prompt": prompt, "chosen": record.chosen, "rejected": record.rejected}


def read(directory: Path, name: str, *rows: Any, **options: Any) -> list[Any]:
    (directory / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    source = SourceSpec(name="set", adapter=name, path="rows.jsonl", options=options)
    return list(open_source(source, directory).read(seed=0))


@pytest.mark.parametrize(("name", "number"), CASES)
def test_a_row_of_the_set(tmp_path: Path, name: str, number: int) -> None:
    case = yaml.safe_load((ROWS / f"{name}.yaml").read_text())[number]
    found = read(tmp_path, name, case["row"], **case.get("options", {}))
    assert [plain(record) for record in found] == case.get("all", [case.get("gives")])


def test_every_fixture_is_of_an_adapter() -> None:
    assert sorted(path.stem for path in ROWS.glob("*.yaml")) == NAMES


@pytest.mark.parametrize("name", sorted(aihub.ADAPTERS))
def test_a_row_of_another_set_names_what_is_missing(tmp_path: Path, name: str) -> None:
    options = {"people": True} if "people" in ADAPTERS[name].options else {}
    (drop,) = read(tmp_path, name, {"title": "x", "body": "y"}, **options)
    assert isinstance(drop, Drop)
    assert drop.reason == "wrong_schema"
    assert "has no key '" in drop.detail
    assert "(its keys: body, title)" in drop.detail


def test_another_family_is_sent_to_its_adapter(tmp_path: Path) -> None:
    (drop,) = read(tmp_path, "aihub_multisession", {"sessionInfo": [{"sessionPersonaSummary": {}, "dialog": []}]})
    assert "use adapter aihub_141" in drop.detail
    (drop,) = read(tmp_path, "aihub_141", {"sessionInfo": [{"dialog": []}]})
    assert "people: true" in drop.detail


def test_options_give_other_names_to_a_published_set(tmp_path: Path) -> None:
    (record,) = read(tmp_path, "orca_dpo_pairs_ko", {"질문": "q", "chosen": "good", "rejected": "bad"}, prompt="질문")
    assert plain(record) == {"prompt": [["user", "q"]], "chosen": "good", "rejected": "bad"}


def test_places_name_the_file_the_row_and_the_record_in_it(tmp_path: Path) -> None:
    rows = [{"info": [{"annotations": {"lines": []}}, {"annotations": {"lines": []}}]}] * 2
    assert [drop.where for drop in read(tmp_path, "aihub_021", *rows)] == [
        "rows.jsonl:1#1",
        "rows.jsonl:1#2",
        "rows.jsonl:2#1",
        "rows.jsonl:2#2",
    ]


@pytest.mark.parametrize(
    ("path", "part", "read"),
    [
        ("3.개방데이터/1.데이터/Training/02.라벨링데이터/TL_session2.zip", "training", True),
        ("3.개방데이터/1.데이터/Training/01.원천데이터/TS_session2.zip", "training", False),
        ("3.개방데이터/1.데이터/Validation/02.라벨링데이터/VL_session2.zip", "training", False),
        ("3.개방데이터/1.데이터/Validation/02.라벨링데이터/VL_session2.zip", "validation", True),
        ("3.개방데이터/1.데이터/Training/02.라벨링데이터/TL_session2.zip", "validation", False),
        ("3.개방데이터/1.데이터/Validation/02.라벨링데이터/VL_session2.zip", "all", True),
        ("3.개방데이터/1.데이터/Validation/01.원천데이터/VS_session2.zip", "all", False),
        ("VL_평가용_무해성/a.json", "training", False),
        ("TL1.zip", "training", True),
        ("TStory/a.json", "training", True),
        ("Tales/a.json", "training", True),
        ("a.json", "validation", True),
    ],
)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_only_the_labelled_part_and_the_wanted_split_are_read(path: str, part: str, read: bool, form: Any) -> None:
    source = SourceSpec(name="s", adapter="aihub_multisession", options={"part": part})
    assert aihub.selects(unicodedata.normalize(form, path), source) is read


def test_licences_and_flags() -> None:
    def flags(adapter: str, **settings: Any) -> tuple[str | None, list[str]]:
        source = SourceSpec(name="s", adapter=adapter, **settings)
        return license_of(source), flags_of(source)

    assert flags("aihub_71760") == ("AIHub", ["benchmark"])
    assert flags("stanford_alpaca") == ("CC-BY-NC-4.0", ["non-commercial"])
    assert flags("slimorca") == ("MIT", [])
    assert flags("openhermes") == (None, [])
    assert flags("messages", license="Non-Commercial use only")[1] == ["non-commercial"]
    assert flags("messages", license="NCSA")[1] == []
    assert flags("slimorca", license="cc-by-nc-4.0") == ("cc-by-nc-4.0", ["non-commercial"])


def test_every_adapter_of_rows_says_which_fields_it_reads() -> None:
    assert [name for name, adapter in ADAPTERS.items() if adapter.reads is None and adapter.rows is None] == []


@pytest.mark.parametrize(
    ("name", "row", "options", "unread"),
    [
        (
            "aihub_046",
            {"utterances": [{"role": "speaker", "text": "힘들어요.", "terminate": True}], "info": {"id": 1}},
            {},
            {"info", "utterances.terminate"},
        ),
        (
            "aihub_020",
            {"annotations": {"lines": [{"speaker": "1", "norm_text": "네", "morpheme": "x"}]}},
            {"people": True},
            {"annotations.lines.morpheme"},
        ),
        ("aihub_multisession", {"dialog": [], "prevAggregatedSummary": {"speaker1": ["a"]}}, {}, {"prevAggregatedSummary"}),
        ("aihub_multisession", {"dialog": [], "prevAggregatedSummary": {"speaker1": ["a"]}}, {"memory": True}, set()),
        ("aihub_71748", {"question": "q", "answer01": {"contents": "a"}, "hint": "h"}, {}, {"hint"}),
        (
            "aihub_71760",
            {"Prompt": "q", "Candidate_answer": {"A": "a"}, "best": "A", "system": "s", "why": 1},
            {"label": "best"},
            {"system", "why"},
        ),
    ],
)
def test_fields_of_a_known_set_that_are_not_read_are_found(name: str, row: Any, options: Any, unread: set[str]) -> None:
    use = FieldUse(ADAPTERS[name], SourceSpec(name="s", adapter=name, path="s", options=options))
    use.look(row)
    assert use.unread == unread
