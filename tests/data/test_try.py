"""`keural data try`: what a file is, which adapter reads it, and what becomes of its rows, before there is a recipe."""

import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keural.cli.data_try import show_trials
from keural.data.field_use import excerpt
from keural.data.prepare import prepare
from keural.data.preview.guess import Rows, guesses
from keural.data.preview.shapes import SHAPES, Shape
from keural.data.preview.trial import MAX_ROWS, try_path
from keural.data.readers.datafile import Row
from keural.errors import UserError
from keural.parsing import json_beginning, parse_yaml
from keural.recipe import DataSpec, SourceSpec
from keural.tokenizer import KeuralTokenizer
from tests.helpers.examples import examples

Capture = pytest.CaptureFixture[str]
FILES = Path(__file__).parent / "try_files"
SECONDS = 10.0
"""Of the processor, so long a look may take; it takes a tenth of it."""
EXPECTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "articles.parquet": ("text", {}, "parquet"),
    "assistant_tools.jsonl": ("messages", {}, "jsonl, utf-8"),
    "chat_lists.parquet": ("messages", {}, "parquet"),
    "chatlog.jsonl": ("messages", {"field": "log", "role": "speaker", "content": "utterance", "roles": "in_order"}, "jsonl, utf-8"),
    "completions.json": ("prompt_completion", {}, "jsonl, utf-8"),
    "crawl.jsonl.gz": ("text", {"field": "body"}, "jsonl, gzip, utf-8"),
    "dpo.jsonl": ("preference", {}, "jsonl, utf-8"),
    "faq.csv": ("qa", {"question": "질문", "answer": "답변"}, "csv, cp949, cells divided by commas"),
    "faq_excel.tsv": ("qa", {"question": "Question", "answer": "Answer"}, "tsv, utf-16, cells divided by tabs"),
    "guide.md": ("markdown", {}, "markdown, utf-8"),
    "judged.csv": (
        "preference",
        {"answers": ["answer_a", "answer_b"], "label": "better"},
        "csv, utf-8, cells divided by semicolons",
    ),
    "menu.ko.po": ("po", {}, "po, utf-8"),
    "no_header.csv": ("qa", {"header": False, "question": "0", "answer": "1"}, "csv, utf-8, cells divided by commas"),
    "packed.zip": ("qa", {"question": "query", "answer": "response"}, "zip"),
    "parallel.tsv": (
        "qa",
        {"question": "en", "answer": "ko", "template": "한국어로 옮기세요: {question}"},
        "tsv, utf-8, cells divided by tabs",
    ),
    "rated_lists.jsonl": ("preference", {"answers": "responses", "scores": "scores"}, "jsonl, utf-8"),
    "reading.json": ("squad", {}, "json, utf-8"),
    "small_talk.yml": ("dialogue", {"rows": "conversations"}, "yaml, utf-8"),
    "thumbs.jsonl": ("kto", {}, "jsonl, utf-8"),
    "transcripts.jsonl": ("hh_rlhf", {}, "jsonl, utf-8"),
    "vicuna_style.json": ("sharegpt", {}, "json, utf-8"),
    "which_is_better.jsonl": ("preference", {"answers": ["answer_1", "answer_2"]}, "jsonl, utf-8"),
    "이야기.txt": ("text", {}, "text, cp949"),
    "지시.json": ("alpaca", {}, "json, utf-8"),
}
NOTHING = {"numbers.csv": "no adapter keeps a row", "picture.jsonl": "is an image"}


def test_every_file_is_expected_to_be_something() -> None:
    assert sorted(path.name for path in FILES.iterdir()) == sorted([*EXPECTED, *NOTHING])


@pytest.mark.parametrize("name", EXPECTED)
def test_the_adapter_and_the_encoding_of_a_file(name: str) -> None:
    started = time.process_time()
    (trial,) = try_path(FILES / name, None, {}, None)
    assert time.process_time() - started < SECONDS
    adapter, options, what = EXPECTED[name]
    assert (trial.spec.adapter, trial.spec.options) == (adapter, options)
    assert trial.what[0].startswith(f"{name} ({what}, ")


@pytest.mark.parametrize("name", NOTHING)
def test_what_no_adapter_reads_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}: {NOTHING[name]}"):
        try_path(FILES / name, None, {}, None)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_source_to_paste_is_one_that_a_recipe_takes(name: str, capsys: Capture) -> None:
    show_trials(FILES / name, None, [], None)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("- {")]
    (found,) = parse_yaml(line)
    assert (found["adapter"], found.get("options", {})) == EXPECTED[name][:2]
    pasted = FILES.parent / "try_files"
    again = SourceSpec(**found)
    assert again.path == name
    assert (pasted / again.path).is_file()


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if not {"labels", "flags", "reasoning"} & set(shape.options)])
def test_the_adapter_of_every_shape_of_the_reference_is_found(shape: Shape) -> None:
    best = guesses(Rows("jsonl", "data.jsonl", [Row(f"data.jsonl:{line}", shape.row) for line in range(1, 6)]))[0]
    declared = {"one question for all rows": "text", "question and answer, the answer inside a list": "qa"}
    assert best.adapter == declared.get(shape.name, shape.adapter)


def show(capsys: Capture, path: Path, *given: str, adapter: str | None = None, tokenizer: Path | None = None) -> str:
    show_trials(path, adapter, list(given), tokenizer)
    return capsys.readouterr().out


def test_what_is_trained_is_marked_where_nothing_can_be_underlined(capsys: Capture) -> None:
    text = show(capsys, FILES / "assistant_tools.jsonl")
    assert "kept; trained is what is between ⟦ and ⟧" in text
    assert '⟦<tool_call>\n{"name": "tide"' in text
    assert '<|im_start|>tool\n{"high"' in text
    assert "⟦목포에서는 5시 40분에 물이 가장 높습니다.<|im_end|>⟧" in text
    assert "not read: id" in text
    assert "objective sft" in text


def test_a_value_of_no_declared_meaning_is_not_guessed(capsys: Capture) -> None:
    text = show(capsys, FILES / "which_is_better.jsonl")
    assert "refused: source 'which_is_better': label is 0 (3 rows)" in text
    assert "(beside label is 1 (3 rows)); options: {labels: {'0': ..., '1': ...}} says what each means" in text
    declared = show(capsys, FILES / "which_is_better.jsonl", "labels={0: second, 1: first}", "answers=[answer_1, answer_2]",
                    adapter="preference")  # fmt: skip
    assert "6 kept" in declared
    assert "refused" not in declared


def test_an_adapter_that_leaves_out_what_cannot_be_used_is_not_the_better_one(tmp_path: Path, capsys: Capture) -> None:
    shapes = {
        "alpaca": {"instruction": "Add them.", "input": [1, 2], "output": "3"},
        "preference": {"prompt": "Name a tree.", "question": "Name a fish.", "chosen": "An oak.", "rejected": "A trout."},
    }
    for adapter, row in shapes.items():
        (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 5)
        with pytest.raises(UserError, match="no row is kept"):
            show(capsys, tmp_path / "rows.jsonl")
        assert f"adapter {adapter} keeps 0 of 5 rows" in capsys.readouterr().out


def test_dropped_rows_are_shown_with_what_can_be_done(tmp_path: Path, capsys: Capture) -> None:
    rows = [{"question": f"What is {n}?", "answer": "" if n % 2 else f"A number, {n}."} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = show(capsys, tmp_path / "rows.jsonl")
    assert "adapter qa keeps 6 of 12 rows, reads question, answer" in text
    assert "dropped 6: empty_turn: a turn is empty or white space" in text
    assert text.count('{"question": "What is') == 3, "three of a reason"
    assert '[rows.jsonl:2] {"question": "What is 1?", "answer": ""}' in text


def test_tokens_are_counted_with_a_tokenizer(tokenizer: KeuralTokenizer, tmp_path: Path, capsys: Capture) -> None:
    tokenizer.save(tmp_path / "runs" / "tokenizer")
    assert "--tokenizer" in show(capsys, FILES / "dpo.jsonl")
    made = tmp_path / "runs" / "tokenizer"
    for path in (tmp_path / "runs", made, made / "tokenizer.model"):
        text = show(capsys, FILES / "vicuna_style.json", tokenizer=path)
        assert " tokens, " in text
        assert "not counted" not in text
    with pytest.raises(UserError, match="no tokenizer there"):
        show(capsys, FILES / "dpo.jsonl", tokenizer=tmp_path)


def test_a_source_as_a_recipe_has_it(tmp_path: Path, capsys: Capture) -> None:
    source = "{name: mine, adapter: qa, path: faq.csv, options: {question: 질문, answer: 답변}}"
    for text in (
        source,
        f"[{source}]",
        f"sources: [{source}]",
        f"objective: sft\ndata: {{sequence_length: 64, sources: [{source}]}}",
    ):
        (tmp_path / "s.yaml").write_text(text)
        assert "6 kept" in show(capsys, tmp_path / "s.yaml", f"data={FILES}")
    with pytest.raises(UserError, match=r"no such file or directory: .*faq.csv; check data=DIR"):
        show(capsys, tmp_path / "s.yaml")
    (tmp_path / "s.yaml").write_text(source.replace("adapter: qa", "adapter: qaa"))
    with pytest.raises(UserError, match="unknown adapter 'qaa'"):
        show(capsys, tmp_path / "s.yaml", f"data={FILES}")


def test_a_directory_is_the_format_that_most_of_it_is(tmp_path: Path, capsys: Capture) -> None:
    for number in range(20):
        (tmp_path / "docs").mkdir(exist_ok=True)
        (tmp_path / "docs" / f"page-{number}.md").write_text(f"# Page {number}\n\nSome words about the number {number}.\n" * 20)
    (tmp_path / "docs" / "list.csv").write_text("a,b\n1,2\n")
    (tmp_path / "docs" / "logo.bin").write_bytes(b"\0\1")
    text = show(capsys, tmp_path / "docs")
    assert "20 files, the first page-0.md (markdown, utf-8" in text
    assert "files that were not looked at: 1 csv, 1 of no known format" in text
    assert "the first 8 rows looked at: 8 kept, 0 dropped" in text, "of some files, not of all"
    assert "- {name: docs, adapter: markdown, path: docs" in text
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no file of a known format, by suffix: no files"):
        try_path(tmp_path / "empty", None, {}, None)


def test_options_of_the_reader_and_of_the_adapter(tmp_path: Path, capsys: Capture) -> None:
    with tarfile.open(tmp_path / "pair.tar.gz", "w:gz") as archive:
        for language in ("ko", "en"):
            (tmp_path / f"a.{language}").write_text(f"the text in {language}\n")
            archive.add(tmp_path / f"a.{language}", f"a.{language}")
    with pytest.raises(UserError, match=r"options: \{suffixes: "):
        show(capsys, tmp_path / "pair.tar.gz")
    assert "options: {suffixes: [.en]}" in show(capsys, tmp_path / "pair.tar.gz", "suffixes=[.en]")
    with pytest.raises(UserError, match="option 'question' is of an adapter; give --adapter, too"):
        show(capsys, FILES / "faq.csv", "question=질문")
    with pytest.raises(UserError, match="give data=DIR, or options"):
        show(capsys, FILES / "faq.csv", "question")
    with pytest.raises(UserError, match="unknown option 'kwestion' of adapter qa"):
        show(capsys, FILES / "faq.csv", "kwestion=질문", adapter="qa")


def test_only_the_beginning_of_a_large_file_is_read(tmp_path: Path) -> None:
    row = {"question": "What is it?", "answer": "x" * 2000}
    (tmp_path / "large.json").write_text(json.dumps([row | {"id": n} for n in range(17_000)], indent=1))
    (tmp_path / "large.jsonl").write_text("\n".join(json.dumps(row | {"id": n}) for n in range(17_000)))
    for name in ("large.json", "large.jsonl"):
        started = time.process_time()
        (trial,) = try_path(tmp_path / name, None, {}, None)
        assert time.process_time() - started < SECONDS
        assert trial.counter is not None
        assert trial.counter.rows <= MAX_ROWS
        assert not trial.whole
        assert trial.spec.adapter == "qa"


@given(st.lists(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=5) | st.lists(st.booleans(), max_size=2))),
       st.none() | st.text(min_size=1, max_size=3), st.data())  # fmt: skip
@examples(15)
def test_the_beginning_of_json_holds_the_items_that_are_whole(items: list[Any], key: str | None, data: st.DataObject) -> None:
    text = json.dumps(items if key is None else {"version": 1, key: items}, indent=data.draw(st.sampled_from([None, 1])))
    cut = data.draw(st.integers(0, len(text)))
    found, name = json_beginning(text[:cut])
    assert found == items[: len(found)]
    assert json_beginning(text)[0] == items or key == "version"
    assert not found or name == key


def test_what_is_shown_is_what_is_prepared(tokenizer: KeuralTokenizer, tmp_path: Path) -> None:
    names = [
        name for name, (adapter, _, _) in EXPECTED.items() if adapter in ("messages", "sharegpt", "alpaca", "qa", "kto", "squad")
    ]
    for name in names:
        (trial,) = try_path(FILES / name, None, {}, None)
        spec = DataSpec(sources=[trial.spec], sequence_length=4096)
        (row,) = prepare(spec, "sft", FILES, tokenizer, tmp_path / "data", 0).table
        assert trial.counter is not None
        assert (row.rows, row.kept, row.drops) == (trial.counter.rows, trial.counter.kept, dict(trial.counter.drops)), name


def test_an_excerpt_is_short_whatever_the_row_holds() -> None:
    deep: Any = "x" * 100_000
    for _ in range(50):
        deep = {"a": [deep] * 30}
    assert len(excerpt(deep, 300)) <= 300
    assert excerpt({"a": 1, "b": ["c"]}, 300) == '{"a": 1, "b": ["c"]}'


def test_a_look_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\nfrom keural.cli.app import main\nsys.argv = ['keural', 'data', 'try', sys.argv[1]]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, FILES / "dpo.jsonl"], capture_output=True, text=True, check=True, timeout=240
    )
    assert done.stdout.splitlines()[-1] == "[]"


# Which of several answers is the better is never made up


def best(row: Any) -> tuple[str, dict[str, Any]]:
    """The first guess for rows of one shape."""
    found = guesses(Rows("jsonl", "data.jsonl", [Row(f"data.jsonl:{line}", row) for line in range(1, 6)]))[0]
    return found.adapter, found.options


@pytest.mark.parametrize(
    ("row", "options"),
    [
        (
            {"prompt": "q", "responses": ["b", "a"], "ranking": [2, 1]},
            {"answers": "responses", "scores": "ranking", "lower_is_better": True},
        ),
        (
            {"prompt": "q", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]},
            {"answers": "answers", "scores": "rank", "lower_is_better": True},
        ),
        (
            {"instruction": "q", "completions": [{"response": "b", "overall_score": 2.0}, {"response": "a", "overall_score": 9.5}]},
            {"answers": "completions", "scores": "overall_score"},
        ),
        (
            {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 0},
            {"answers": ["response_0", "response_1"], "label": "better_response_id"},
        ),
        (
            {"prompt": "q", "response_a": "a", "response_b": "b", "chosen": "response_b"},
            {"answers": ["response_a", "response_b"], "label": "chosen"},
        ),
        (
            {
                f"conversation_{side}": [{"role": "user", "content": "q"}, {"role": "assistant", "content": side}]
                for side in ("a", "b")
            }
            | {"winner": "model_a"},
            {"answers": ["conversation_a", "conversation_b"], "label": "winner"},
        ),
        (
            {"model_a": "one", "model_b": "other", "winner": "model_a"}
            | {
                f"conversation_{side}": [{"role": "user", "content": "q"}, {"role": "assistant", "content": side}]
                for side in ("a", "b")
            },
            {"answers": ["conversation_a", "conversation_b"], "label": "winner"},
        ),
        ({"prompt": "q", "responses": ["a", "b"], "best": 0}, {"answers": "responses", "label": "best"}),
        (
            {"question": "q", "answers": [{"text": "a", "upvotes": 1}, {"text": "b", "upvotes": 3}]},
            {"answers": "answers", "scores": "upvotes"},
        ),
        (
            {"prompt": "q", "answer_a": "a", "answer_b": "b", "votes_a": 1, "votes_b": 2},
            {"answers": ["answer_a", "answer_b"], "scores": ["votes_a", "votes_b"]},
        ),
    ],
)
def test_what_prefers_one_of_several_answers_is_not_left_out(row: Any, options: dict[str, Any]) -> None:
    assert best(row) == ("preference", options)


def test_of_a_file_of_splits_the_longest_is_tried(tmp_path: Path, capsys: Capture) -> None:
    rows = [{"instruction": f"Name tree {number}.", "output": "An oak."} for number in range(4)]
    (tmp_path / "data.json").write_text(json.dumps({"train": rows[:3], "test": rows[3:]}))
    shown = show(capsys, tmp_path / "data.json")
    assert "keeps 3 of 3 rows" in shown
    assert "options: {rows: train}" in shown


def test_a_list_of_which_the_adapter_would_read_nothing_is_not_unfolded() -> None:
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert best({"messages": chat, "available_tools": [{"type": "function", "function": {"name": "wind"}}]}) == ("messages", {})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "responses": ["a", "b"], "scores": [1.0, float("nan")]},
        {"prompt": "q", "responses": ["a", "b"], "chosen": 0, "rejected": 1},
        {"question": "q", "answers": [{"text": "b", "selected": False}, {"text": "a", "selected": True}]},
        {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "score_A": 9, "score_B": 3},
    ],
)
def test_an_order_is_not_assumed_beside_what_may_say_another_and_no_answer_is_its_prompt(row: Any) -> None:
    found = guesses(Rows("jsonl", "data.jsonl", [Row(f"data.jsonl:{line}", row) for line in range(1, 6)]))
    assert not any("order" in guess.options for guess in found)
    assert not any(guess.options.get("prompt") in (guess.options.get("answers") or []) for guess in found)


def test_what_is_only_assumed_of_several_answers_is_said(tmp_path: Path, capsys: Capture) -> None:
    rows = {
        "order": {"prompt": "Name a tree.", "completions": ["An oak.", "A rose."]},
        "rank": {"prompt": "Name a tree.", "responses": ["An oak.", "A rose."], "rank": [1, 2]},
        "unfold": {"asked": [{"question": "Name a tree.", "answer": "An oak."}, {"question": "Another.", "answer": "A birch."}]},
    }
    said = {
        "order": "is only assumed: option order",
        "rank": "is only assumed, from its name: option lower_is_better",
        "unfold": "becomes a record of its own, without those before it",
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
        assert said[name] in show(capsys, tmp_path / f"{name}.jsonl")


def test_a_system_text_in_parts_is_not_taken_for_records() -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert best({"system": [{"type": "text", "text": "s"}], "messages": turns}) == ("messages", {})


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        (
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}]},
            "content_not_text (1 rows, first rows.jsonl:1: 'thinking')",
        ),
        ({"Role": "assistant", "Content": "a"}, "unknown_role (1 rows, first rows.jsonl:1: 'none')"),
        ({"role": "assistant", "content": ["a", "b"]}, "malformed_row (1 rows, first rows.jsonl:1: content is a list)"),
    ],
)
def test_turns_that_cannot_be_read_are_shown_with_the_reason(tmp_path: Path, capsys: Capture, turn: Any, words: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "q"}, turn]}))
    with pytest.raises(UserError, match="no row is kept; see above"):
        show_trials(tmp_path / "rows.jsonl", None, [], None)
    assert words in capsys.readouterr().out


def test_a_row_that_cannot_be_taken_apart_is_shown_as_it_is(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "q", "responses": ["a", "b"], "scores": [True, False]}))
    with pytest.raises(UserError):
        show_trials(tmp_path / "rows.jsonl", None, [], None)
    assert '"responses": ["a", "b"], "scores": [true, false]}' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", '{"q": 1},\n', "first a.jsonl:1: extra data"),
        ("a.csv", "q,a\n1,2,3\n4,5,6\n", "first a.csv:2: 3 cells, not 2"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_first_place(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words):
        try_path(tmp_path / name, None, {}, None)
