"""What preparing says: every source that cannot be used at once, the table of drops, rows to look at afterwards, progress."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from keural import terminal
from keural.data.field_use import DROPPED_CHARACTERS, MAX_DROPPED
from keural.data.prepare import UnusableSources, prepare
from keural.data.prepared import DROPPED, read_dropped
from keural.data.records import Document
from keural.data.sources import open_sources
from keural.errors import UserError, UserErrors, for_all
from keural.pipeline.workspace import UnusableData
from keural.recipe import DataSpec, SourceSpec
from keural.tokenizer import KeuralTokenizer
from tests.helpers.shapes import OF_A_RECIPE

Command = Callable[..., tuple[int, str, str]]
Write = Callable[..., SourceSpec]
GOOD = [{"question": f"What is {n}?", "answer": f"{n} is a number"} for n in range(20)]


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.fixture
def recipe(tmp_path: Path, tokenizer: KeuralTokenizer) -> Callable[..., Path]:
    """A recipe of stages with these sources."""

    def written(**stages: list[dict[str, Any]]) -> Path:
        directory = tmp_path / "recipe"
        directory.mkdir(exist_ok=True)
        tokenizer.save(tmp_path / "tokenizer")
        values = {"name": "r", "model": OF_A_RECIPE, "tokenizer": {"path": str(tmp_path / "tokenizer")}, "stages": list(stages)}
        (directory / "recipe.yaml").write_text(yaml.safe_dump(values))
        for name, sources in stages.items():
            stage = {"name": name, "objective": "sft", "train": {"steps": 2, "batch_tokens": 256, "lr": 1e-3},
                     "data": {"sources": sources, "sequence_length": 128}}  # fmt: skip
            (directory / f"{name}.yaml").write_text(yaml.safe_dump(stage))
        return directory

    return written


# Every source that cannot be used


def test_unusable_sources_are_said_all_at_once_with_the_fields_of_their_rows(
    write: Write, tokenizer: KeuralTokenizer, tmp_path: Path, data_dir: Path
) -> None:
    first = write("a.jsonl", lines([{"prompt": "q", "reply": "a"}] * 3), "qa", name="first")
    good = write("b.jsonl", lines(GOOD), "qa", name="good")
    third = write("c.jsonl", lines([{"question": "q", "answer": "a", "label": "x", "train": 7}]), "qa", name="third")
    spec = DataSpec(sources=[first, good, third], sequence_length=128)
    with pytest.raises(UnusableSources) as refused:
        prepare(spec, "sft", data_dir, tokenizer, tmp_path / "out", seed=1)
    said = refused.value.lines
    assert len(said) == 2
    assert said[0].startswith("source 'first': 100.0% of 3 rows are dropped")
    assert said[0].endswith("(fields of its rows: prompt, reply)")
    assert said[1].startswith("source 'third': train is 7 (1 rows)")
    assert [(row.source, row.rows, row.kept) for row in refused.value.table] == [("first", 3, 0), ("good", 20, 20), ("third", 1, 0)]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file-hashes.json"], "nothing half-written is left"


def test_one_unusable_source_is_refused_as_ever(write: Write, tokenizer: KeuralTokenizer, tmp_path: Path, data_dir: Path) -> None:
    spec = DataSpec(sources=[write("a.jsonl", lines([{"messages": []}]), "openorca")], sequence_length=128)
    with pytest.raises(UserError, match=r"the row has no key 'question' .its keys: messages.$"):
        prepare(spec, "sft", data_dir, tokenizer, tmp_path / "out", seed=1)


def test_the_command_says_all_of_every_stage_and_prints_the_tables(
    recipe: Any, write: Write, keural: Command, tmp_path: Path
) -> None:
    write("good.jsonl", lines(GOOD))
    write("bad.jsonl", lines([{"a": 1, "b": 2}]))
    good = {"name": "good", "adapter": "qa", "path": "good.jsonl"}
    bad = {"name": "bad", "adapter": "qa", "path": "bad.jsonl"}
    directory = recipe(one=[bad, good], two=[good, bad | {"name": "worse"}], three=[good])
    for command in (("data", "prepare"), ("run",)):
        code, out, err = keural(*command, directory, f"data={tmp_path / 'data'}", "--out", tmp_path / "out")
        assert code == 2
        said = [line for line in err.splitlines() if line.startswith("keural: error: ")]
        assert [line.split("'")[1] for line in said] == ["bad", "worse"]
        assert all("(fields of its rows: a, b)" in line for line in said)
        assert re.search(r"│ good +│ +20 │ +20 │", out)
        assert re.search(r"│ bad +│ +1 │ +0 │", out)
        assert "missing_question" in out


def test_missing_files_of_all_sources_are_said_before_anything_is_read(
    recipe: Any, write: Write, keural: Command, tmp_path: Path
) -> None:
    write("good.jsonl", lines(GOOD))
    source = {"adapter": "qa", "path": "good.jsonl"}
    wrong = [source | {"name": "x", "path": "x.jsonl"}, source | {"name": "y", "path": "y.jsonl"},
             source | {"name": "z", "options": {"kwestion": "a"}}]  # fmt: skip
    directory = recipe(one=[wrong[0], source | {"name": "good"}], two=wrong[1:])
    code, _, err = keural("data", "prepare", directory, f"data={tmp_path / 'data'}", "--out", tmp_path / "out")
    assert code == 2
    assert [line.split("'")[1] for line in err.splitlines()] == ["x", "y", "z"]
    assert not (tmp_path / "out").exists()


def test_several_mistakes_are_lines_of_their_own() -> None:
    def fail(number: int) -> int:
        if number % 2:
            raise UserError(f"{number} is odd")
        return number

    assert for_all([2, 4], fail) == [2, 4]
    with pytest.raises(UserError, match=r"^3 is odd$"):
        for_all([2, 3], fail)
    with pytest.raises(UserErrors) as both:
        for_all([1, 2, 3], fail)
    assert both.value.lines == ("1 is odd", "3 is odd")
    nested = UserErrors([both.value, UserError("another"), UserError("1 is odd")])
    assert nested.lines == ("1 is odd", "3 is odd", "another")
    assert UnusableData({"s": nested}).lines == nested.lines


# The table


def test_a_run_prints_the_table_of_what_it_prepares_and_not_again(
    recipe: Any, write: Write, keural: Command, tmp_path: Path
) -> None:
    write("rows.jsonl", lines([*GOOD, {"question": "q", "answer": ""}]))
    directory = recipe(one=[{"name": "rows", "adapter": "qa", "path": "rows.jsonl"}])
    code, out, err = keural("run", directory, f"data={tmp_path / 'data'}", "--out", tmp_path / "out")
    assert code == 0, err
    assert "empty_turn 1 (first: rows.jsonl:21)" in out
    code, out, _ = keural("run", directory, f"data={tmp_path / 'data'}", "--out", tmp_path / "out")
    assert code == 0
    assert "empty_turn" not in out


# Dropped rows


def test_dropped_rows_can_be_looked_at_and_are_few_and_short(
    write: Write, tokenizer: KeuralTokenizer, tmp_path: Path, data_dir: Path
) -> None:
    rows = [
        *GOOD,
        *({"question": f"q{n}", "answer": ""} for n in range(30)),
        {"question": ["x"] * 10_000, "answer": "y" * 100_000},
        *GOOD[:2],
        {"question": "Is that your number?", "answer": "Yes: 010-1234-5678."},
        {"question": "long", "answer": "word " * 400},
    ]
    spec = DataSpec(
        sources=[write("r.jsonl", lines(rows) + "{broken\n", "qa", gates={"personal_data": "drop"}, max_drop=1)], sequence_length=64
    )
    prepared = prepare(spec, "sft", data_dir, tokenizer, tmp_path / "out", seed=1)
    dropped = read_dropped(prepared)
    by_reason = {reason: [row for row in dropped if row["reason"] == reason] for reason in prepared.table[0].drops}
    assert len(by_reason["empty_turn"]) == MAX_DROPPED
    assert by_reason["empty_turn"][0]["row"] == '{"question": "q0", "answer": ""}'
    (large,) = by_reason["question_is_not_text"]
    assert len(large["row"]) <= DROPPED_CHARACTERS
    assert json.loads(by_reason["duplicate"][0]["row"])["messages"][0] == {"role": "user", "content": "What is 0?"}
    assert by_reason["personal_data"][0]["row"] == "", "it was dropped so that nothing keeps it"
    assert "010" not in (prepared.train.parent / DROPPED).read_text()
    assert [row["where"] for row in by_reason["too_long"]] == ["r.jsonl:55"]
    assert by_reason["malformed_row"][0]["where"] == "r.jsonl:56"


def test_damaged_dropped_rows_are_refused(write: Write, tokenizer: KeuralTokenizer, tmp_path: Path, data_dir: Path) -> None:
    source = write("r.jsonl", lines([*GOOD, {"question": "q", "answer": ""}]), "qa")
    prepared = prepare(DataSpec(sources=[source], sequence_length=128), "sft", data_dir, tokenizer, tmp_path / "out", seed=1)
    path = prepared.train.parent / DROPPED
    path.write_text(path.read_text().replace("empty", "emptx"))
    with pytest.raises(UserError, match="its checksum differs"):
        read_dropped(prepared)
    path.unlink()
    with pytest.raises(UserError, match="gone"):
        read_dropped(prepared)


def test_show_prints_dropped_rows_and_marks_trained_tokens_without_a_terminal(
    recipe: Any, write: Write, keural: Command, tmp_path: Path
) -> None:
    write("rows.jsonl", lines([*GOOD, {"question": "q", "answer": ""}]))
    stage = recipe(one=[{"name": "rows", "adapter": "qa", "path": "rows.jsonl"}]) / "one.yaml"
    given = (stage, f"data={tmp_path / 'data'}", "--out", tmp_path / "out")
    _, out, _ = keural("data", "show", *given)
    assert "trained, between ⟦ and ⟧" in out
    assert re.search(r"<\|im_start\|>assistant\n⟦\d+ is a number<\|im_end\|>⟧", out)
    _, out, _ = keural("data", "show", *given, "--dropped", "all")
    assert "rows: 1 dropped for empty_turn: a turn is empty or white space" in out
    assert '[rows.jsonl:21] {"question": "q", "answer": ""}' in out
    code, _, err = keural("data", "show", *given, "--dropped", "emty_turn")
    assert code == 2
    assert "did you mean 'empty_turn'" in err


# Without the data


def test_what_is_prepared_needs_no_data_directory(recipe: Any, write: Write, keural: Command, tmp_path: Path) -> None:
    write("rows.jsonl", lines(GOOD))
    directory = recipe(one=[{"name": "rows", "adapter": "qa", "path": "rows.jsonl"}])
    given = ("--out", tmp_path / "out")
    code, _, err = keural("data", "show", directory / "one.yaml", *given)
    assert code == 2
    assert "give data=DIR" in err
    keural("data", "prepare", directory, f"data={tmp_path / 'data'}", *given)
    (tmp_path / "data" / "rows.jsonl").rename(tmp_path / "away.jsonl")
    code, out, err = keural("data", "show", directory / "one.yaml", *given)
    assert code == 0, err
    assert "is a number<|im_end|>" in out
    assert err.count("its sources were not looked at, for no data=DIR is given") == 1
    code, _, err = keural("run", directory, *given)
    assert code == 0, err
    assert (tmp_path / "out" / "final").exists()
    code, _, err = keural("data", "show", directory / "one.yaml", "one.data.sequence_length=64", *given)
    assert code == 2
    assert "give data=DIR" in err, "other settings are other data"


# Progress


def test_progress_is_told_to_a_log_once_a_minute(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter(range(0, 1000, 25))
    monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    with terminal.work_progress() as tell:
        for number in range(8):
            tell(f"{number} rows")
    assert capsys.readouterr().err.splitlines() == ["2 rows", "5 rows"]


def test_progress_of_reading_is_shown_on_a_terminal(
    write: Write, tokenizer: KeuralTokenizer, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(terminal.sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm-256color")
    source = write("r.jsonl", lines([{"text": f"line {n}"} for n in range(1000)]), "text", name="a [b] source")
    prepare(DataSpec(sources=[source], sequence_length=64), "next_token", data_dir, tokenizer, tmp_path / "out", seed=1)
    assert "source 1 of 1, a [b] source: 768 rows, 768 kept" in screen.getvalue()


def test_open_sources_still_gives_the_sources(write: Write, data_dir: Path) -> None:
    (opened,) = open_sources([write("a.txt", "text")], data_dir)
    assert isinstance(next(opened.read(seed=1)), Document)
