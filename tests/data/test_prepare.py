"""Preparing is deterministic, atomic and done once; drops are counted; what is held out is never trained on; bad sources are
refused.
"""

import json
import resource
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keural.cli.printing import print_data
from keural.data.filtering.holdout import Splitter
from keural.data.prepare import prepare
from keural.data.prepared import Prepared, read_heldout_texts
from keural.data.records import Conversation, Document
from keural.data.sources import open_sources
from keural.data.tokenizer_texts import iter_texts, pieces
from keural.data.tokens.store import TokenStore
from keural.errors import UserError
from keural.recipe import DataSpec, SourceSpec
from keural.tokenizer import KeuralTokenizer
from keural.tokenizer.chatml import Message, render

DOCUMENTS = [f"{number}번째 문서입니다.\nIt is number {number}.\n" for number in range(60)]


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def spec(*sources: SourceSpec, length: int = 400, **others: Any) -> DataSpec:
    return DataSpec(sources=list(sources), sequence_length=length, **others)


class Workplace:
    """Preparation with everything but the spec and objective fixed."""

    def __init__(self, data_dir: Path, out: Path, tokenizer: KeuralTokenizer) -> None:
        self.data_dir, self.out, self.tokenizer = data_dir, out, tokenizer

    def __call__(self, data: DataSpec, objective: str = "next_token", seed: int = 1, out: str = "out") -> Prepared:
        return prepare(data, objective, self.data_dir, self.tokenizer, self.out / out, seed)  # type: ignore[arg-type]

    def texts(self, path: Path) -> list[str]:
        store = TokenStore.open(path, self.tokenizer.sha256)
        return [self.tokenizer.decode(store.sequence(index).tolist()) for index in range(store.num_sequences)]

    def refused(self, data: DataSpec, objective: str, *words: str) -> None:
        with pytest.raises(UserError) as caught:
            self(data, objective)
        message = str(caught.value)
        assert "\n" not in message
        assert all(word in message for word in words), message
        assert not list(self.out.glob("out/*/")), "nothing half-written"


@pytest.fixture
def work(data_dir: Path, tmp_path: Path, tokenizer: KeuralTokenizer) -> Workplace:
    return Workplace(data_dir, tmp_path, tokenizer)


def test_documents_are_framed_shuffled_and_complete(work: Workplace, write: Any) -> None:
    source = write("a.jsonl", jsonl([{"text": text} for text in DOCUMENTS]), license="CC0-1.0", language="ko")
    prepared = work(spec(source))
    store = TokenStore.open(prepared.train, work.tokenizer.sha256)
    assert all(store.sequence(index)[0] == 1 and store.sequence(index)[-1] == 2 for index in range(60))
    texts = work.texts(prepared.train)
    assert sorted(texts) == sorted(DOCUMENTS)
    assert texts != DOCUMENTS
    (row,) = prepared.table
    assert row.tokens == store.num_tokens
    assert (row.rows, row.kept, row.heldout, row.drops, row.warning) == (60, 60, 0, {}, None)
    assert store.manifest["sources"] == [row.to_json() for row in prepared.table]
    assert prepared.heldout is None


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def test_the_same_input_gives_the_same_bytes_and_is_made_once(work: Workplace, write: Any) -> None:
    data = spec(write("a.jsonl", jsonl([{"text": text} for text in DOCUMENTS])), heldout_per_mille=200)
    first = work(data)
    stamps = {path: path.stat().st_mtime_ns for path in first.train.parent.rglob("*")}
    assert work(data) == first
    assert {path: path.stat().st_mtime_ns for path in first.train.parent.rglob("*")} == stamps
    assert not list(work.out.glob("out/.*")), "no temporary files"
    other = work(data, out="other")
    assert files(other.train.parent) == files(first.train.parent)
    assert work(data, seed=2).fingerprint != first.fingerprint
    write("a.jsonl", jsonl([{"text": text} for text in DOCUMENTS[1:]]))
    assert work(data).fingerprint != first.fingerprint


def test_a_full_disk_is_one_line_and_leaves_nothing(work: Workplace, write: Any) -> None:
    data = spec(write("a.jsonl", jsonl([{"text": text * 9} for text in DOCUMENTS])))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
    try:
        work.refused(data, "next_token", "cannot be written (File too large); raise `ulimit -f`")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(work.texts(work(data).train)) == len(DOCUMENTS)


def test_a_store_that_was_deleted_is_made_again(work: Workplace, write: Any) -> None:
    data = spec(write("a.jsonl", jsonl([{"text": text} for text in DOCUMENTS])))
    before = files(work(data).train)
    shutil.rmtree(work(data).train)
    assert files(work(data).train) == before


def test_held_out_content_is_never_trained_on(work: Workplace, write: Any) -> None:
    rows = [{"text": text} for text in DOCUMENTS] + [{"text": text.replace("\n", "  \n ")} for text in DOCUMENTS[:30]]
    sources = [write("a.jsonl", jsonl(rows), name="a"), write("b.jsonl", jsonl([*rows[:5], {"text": "새 글"}]), name="b")]
    held = write("c.jsonl", jsonl([{"text": DOCUMENTS[0].upper()}, {"text": " " + DOCUMENTS[1]}]), name="c")
    prepared = work(spec(*sources, heldout_per_mille=300, heldout_sources=[held]))
    assert prepared.heldout is not None
    squeezed = [{" ".join(text.split()) for text in work.texts(path)} for path in (prepared.train, prepared.heldout)]
    assert not squeezed[0] & squeezed[1]
    assert " ".join(DOCUMENTS[1].split()) in squeezed[1]
    by_name = {row.source: row for row in prepared.table}
    assert by_name["c"].split == "heldout"
    assert by_name["a"].drops["held_out"] == 2
    assert by_name["b"].drops["duplicate"] + by_name["b"].drops.get("held_out", 0) == 5
    assert sum(row.heldout for row in prepared.table) == len(work.texts(prepared.heldout))
    assert sorted(read_heldout_texts(prepared)) == sorted(work.texts(prepared.heldout))


def test_held_out_texts_by_language(work: Workplace, write: Any) -> None:
    ko = write("ko.jsonl", jsonl([{"text": "한국어 글"}]), name="ko", language="ko")
    en = write("en.jsonl", jsonl([{"text": "English"}]), name="en", language="en")
    train = write("a.jsonl", jsonl([{"text": "train"}]), name="a")
    prepared = work(spec(train, heldout_sources=[ko, en]))
    assert read_heldout_texts(prepared, "ko") == ["한국어 글"]
    with pytest.raises(UserError, match="no document in language 'fr' is held out"):
        read_heldout_texts(prepared, "fr")
    with pytest.raises(UserError, match="no document is held out"):
        read_heldout_texts(work(spec(train)))


def test_held_out_texts_by_source(work: Workplace, write: Any) -> None:
    novel = write("novel.jsonl", jsonl([{"text": "novel"}]), name="novel", language="en")
    guide = write("guide.jsonl", jsonl([{"text": "guide"}]), name="guide", language="en")
    prepared = work(spec(write("a.jsonl", jsonl([{"text": "train"}]), name="a"), heldout_sources=[novel, guide]))
    assert read_heldout_texts(prepared, "en", ["guide"]) == ["guide"]
    assert sorted(read_heldout_texts(prepared, None, ["guide", "novel"])) == ["guide", "novel"]
    with pytest.raises(UserError, match="no document in language 'ko' of 'guide' is held out"):
        read_heldout_texts(prepared, "ko", ["guide"])


def test_duplicates_are_dropped_within_and_across_sources(work: Workplace, write: Any) -> None:
    sources = [
        write("a.jsonl", jsonl([{"text": "가"}, {"text": "나"}, {"text": "가"}]), name="a"),
        write("b.jsonl", jsonl([{"text": "나"}, {"text": "다"}]), name="b"),
    ]
    prepared = work(spec(*sources))
    assert sorted(work.texts(prepared.train)) == ["가", "나", "다"]
    assert [(row.drops, row.first_drop) for row in prepared.table] == [
        ({"duplicate": 1}, {"duplicate": "a.jsonl:3"}),
        ({"duplicate": 1}, {"duplicate": "b.jsonl:1"}),
    ]


def test_limit_repeat_expectation_and_minimum(work: Workplace, write: Any) -> None:
    rows = [{"text": "짧다"}, *({"text": text} for text in DOCUMENTS[:10])]
    source = write("a.jsonl", jsonl(rows), limit=3, repeat=2, expect=10)
    prepared = work(spec(source, min_characters=5))
    assert Counter(work.texts(prepared.train)) == dict.fromkeys(DOCUMENTS[:3], 2)
    (row,) = prepared.table
    assert (row.rows, row.kept, row.repeat, row.drops) == (4, 3, 2, {"too_short": 1})
    assert row.tokens == TokenStore.open(prepared.train).num_tokens
    assert row.warning == "source 'source': 3 records kept, 10 expected"


def conversation(*turns: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[place % 2], "content": turn} for place, turn in enumerate(turns)]}


def test_conversations_are_rendered_and_shortened_to_fit(work: Workplace, write: Any) -> None:
    long = ["질문이 있어요", "네", "그것은 무엇입니까?", "좋은 날씨입니다 " * 30, "a", "b"]
    source = write("a.jsonl", jsonl([conversation("안녕", "네!"), conversation(*long), conversation("q " * 200, "a")]), "messages")
    prepared = work(spec(source, length=60), "sft")
    store = TokenStore.open(prepared.train)
    for index, turns in enumerate((["안녕", "네!"], long[:2])):
        messages = [Message(("user", "assistant")[place % 2], turn) for place, turn in enumerate(turns)]
        ids, mask = render(work.tokenizer, messages)
        assert store.sequence(index).tolist() == ids
        assert store.loss_mask(index).tolist() == mask
    (row,) = prepared.table
    assert (row.kept, row.shortened, row.drops) == (2, 1, {"too_long": 1})
    assert store.longest <= 60


def test_pairs_share_their_prompt_and_train_only_the_answer(work: Workplace, write: Any) -> None:
    history = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "old"}, {"role": "user", "content": "r"}]
    rows = [
        {"prompt": history, "chosen": "네, 좋아요.", "rejected": "싫어"},
        {"prompt": "q", "chosen": "good", "rejected": "bad " * 60},
        {"prompt": "q " * 90, "chosen": "good", "rejected": "bad"},
    ]
    prepared = work(spec(write("a.jsonl", jsonl(rows), "preference", max_drop=0.7), length=80), "dpo")
    store = TokenStore.open(prepared.train)
    prompt = render(work.tokenizer, [Message(**message) for message in history], add_generation_prompt=True).ids
    assert store.num_sequences == 2
    for side, answer in enumerate(("네, 좋아요.", "싫어")):
        tokens, mask = store.sequence(side).tolist(), store.loss_mask(side)
        assert tokens[: len(prompt)] == prompt
        trained = [token for token, counted in zip(tokens, mask, strict=True) if counted]
        assert trained == [*work.tokenizer.encode(answer), work.tokenizer.im_end_id]
    assert prepared.table[0].drops == {"answer_too_long": 1, "prompt_too_long": 1}


BAD = [
    ("sft", "messages", conversation("only a question"), "no_assistant_turn"),
    ("dpo", "preference", {"prompt": "q", "chosen": "같다", "rejected": " 같다 "}, "chosen_equals_rejected"),
    ("dpo", "preference", {"prompt": "q " * 500, "chosen": "a", "rejected": "b"}, "prompt_too_long"),
    ("sft", "messages", conversation("q " * 500, "a"), "too_long"),
]


@pytest.mark.parametrize(("objective", "adapter", "row", "reason"), BAD)
def test_bad_rows_are_refused_with_reason_and_place(
    work: Workplace, write: Any, objective: str, adapter: str, row: dict[str, Any], reason: str
) -> None:
    source = write("a.jsonl", jsonl([row]), adapter)
    work.refused(spec(source), objective, "source 'source'", "100.0% of 1 rows", reason, "first a.jsonl:1", "max_drop")
    strict = write("a.jsonl", jsonl([row]), adapter, max_drop=0)
    work.refused(spec(strict), objective, "a.jsonl:1 is dropped", reason, "max_drop 0")


def test_a_source_over_its_share_of_drops_is_refused_with_the_most_frequent_reason(work: Workplace, write: Any) -> None:
    content = jsonl([{"text": "가"}, {"x": 1}, {"x": 1}, {"text": ""}]) + "{broken\n"
    source = write("a.jsonl", content, max_drop=0.7)
    work.refused(spec(source), "next_token", "80.0% of 5 rows", "max_drop 0.7", "missing_text (2 rows, first a.jsonl:2)")
    prepared = work(spec(write("a.jsonl", content, max_drop=0.8)))
    with pytest.raises(UserError, match=r"80\.0% of 5 rows .* max_drop 0\.7"):
        work(spec(source))  # the same rows, prepared already
    assert prepared.table[0].drops == {"missing_text": 2, "empty": 1, "malformed_row": 1}
    assert prepared.table[0].first_drop["malformed_row"] == "a.jsonl:5"


def test_sources_that_give_nothing_are_refused(work: Workplace, write: Any) -> None:
    a = write("a.jsonl", jsonl([{"text": "가"}]), name="a")
    work.refused(spec(a, write("b.jsonl", "\n\n", name="b")), "next_token", "source 'b'", "holds no rows")
    work.refused(spec(a, write("b.jsonl", jsonl([{"text": "가"}]), name="b")), "next_token", "none of its 1 rows", "duplicate")
    work.refused(spec(a, write("b.txt", "", name="b")), "next_token", "b.txt: the file is empty")
    work.refused(spec(a, write("b.po", 'msgid "a"\n', "po", name="b")), "next_token", "malformed_file", "b.po:1")


def test_gates_drop_or_count_and_the_table_shows_it(work: Workplace, write: Any) -> None:
    rows = [
        conversation("q", "I am ChatGPT."),
        conversation("q", "<|im_end|>"),
        conversation("r", "fine"),
        conversation("q", "N/A"),
    ]
    source = write("a.jsonl", jsonl(rows), "messages", gates={"placeholders": "skip"})
    prepared = work(spec(source), "sft")
    (row,) = prepared.table
    assert (row.drops, row.first_drop) == ({"self_identification": 1}, {"self_identification": "a.jsonl:1"})
    assert row.noted == {"control_string": 1, "empty_answer": 1}
    assert (row.kept, row.length_ratio) == (3, None)
    store = TokenStore.open(prepared.train)
    markers = [token for index in range(3) for token in store.sequence(index).tolist() if token == work.tokenizer.im_end_id]
    assert len(markers) == 6, "two turns each: what a user spells stays text"
    strict = write("a.jsonl", jsonl(rows), "messages", gates={"control_strings": "drop"}, max_drop=0.8)
    assert work(spec(strict, length=401), "sft").table[0].drops["control_string"] == 1


def test_a_gate_that_drops_much_of_a_source_is_named_with_an_example(work: Workplace, write: Any, capsys: Any) -> None:
    rows = [conversation(f"q{number}", "I am {{name}}." if number % 3 == 0 else f"An oak, {number}.") for number in range(30)]
    source = write("a.jsonl", jsonl(rows), "messages", max_drop=0.5)
    prepared = work(spec(source), "sft")
    assert prepared.table[0].details == {"placeholder": {"'{{name}}'": 10}}
    print_data(SimpleNamespace(data={"sft": prepared}))  # type: ignore[arg-type]
    shown = " ".join(capsys.readouterr().out.split())
    assert "placeholder drops 33% of its rows; e.g. a.jsonl:1: '{{name}}'; gates: {placeholders: count} keeps them" in shown
    assert "gate placeholders, 33.3%" in shown
    kept = work(spec(write("a.jsonl", jsonl(rows), "messages", gates={"placeholders": "count"})), "sft")
    assert (kept.table[0].kept, kept.table[0].noted, kept.table[0].suspicions) == (30, {"placeholder": 10}, None)


def test_a_gate_that_drops_little_is_in_the_table_alone(work: Workplace, write: Any) -> None:
    rows = [conversation(f"q{number}", "<nooutput>" if number == 0 else f"An oak, {number}.") for number in range(30)]
    row = work(spec(write("a.jsonl", jsonl(rows), "messages")), "sft").table[0]
    assert (row.drops, row.suspicions) == ({"placeholder": 1}, None)


def test_what_too_many_rows_are_dropped_for_has_its_remedy_beside_it(work: Workplace, write: Any) -> None:
    rows = [{"messages": [{"role": "assistant", "content": "Hello."}, *conversation("q", f"{n}")["messages"]]} for n in range(4)]
    work.refused(spec(write("a.jsonl", jsonl(rows), "messages")), "sft", "assistant_first (4 rows", "{assistant_first: keep}")
    named = [conversation("q", f"{{{{name}}}} {n}") for n in range(4)]
    work.refused(spec(write("a.jsonl", jsonl(named), "messages")), "sft", "placeholder (4 rows", "gates: {placeholders: count}")


def test_translations_are_duplicates_by_id(work: Workplace, write: Any) -> None:
    english = [{"question": f"q{n}", "chosen": f"good {n}", "rejected": "bad"} for n in range(4)]
    korean = [{"question": f"물음{n}", "chosen": f"좋다 {n}", "rejected": "나쁘다"} for n in range(5)]
    sources = [
        write("en.jsonl", jsonl(english), "orca_dpo_pairs", name="en", id_field="row_number", id_space="orca"),
        write("ko.jsonl", jsonl(korean), "orca_dpo_pairs_ko", name="ko", id_field="row_number", id_space="orca"),
    ]
    prepared = work(spec(*sources), "dpo")
    assert [(row.kept, row.drops) for row in prepared.table] == [(4, {}), (1, {"duplicate_id": 4})]
    assert prepared.table[0].length_ratio == 2.0


def test_sources_are_left_out_by_licence_or_as_benchmarks(work: Workplace, write: Any) -> None:
    pairs = [{"prompt": f"q{n}", "chosen": "good", "rejected": "bad"} for n in range(3)]
    own = write("own.jsonl", jsonl(pairs), "preference", name="own", license="CC0-1.0")
    noncommercial = write(
        "nc.jsonl", jsonl([{**row, "prompt": "n"} for row in pairs[:1]]), "preference", name="nc", license="CC-BY-NC-4.0"
    )
    benchmark = SourceSpec(name="bench", adapter="aihub_71760", path="not/there")

    unknown = write("u.jsonl", jsonl(pairs), "preference", name="u")
    work.refused(spec(unknown, licenses={"exclude": ["unknown"]}), "dpo", "no source is left to train on", "u (licence unknown)")
    work.refused(spec(own, benchmark), "dpo", "no such file or directory", "not/there")

    def left_out(**settings: Any) -> dict[str, str]:
        prepared = work(spec(own, noncommercial, benchmark, **settings), "dpo")
        assert all(row.rows == 0 for row in prepared.table if row.left_out)
        return {row.source: row.left_out for row in prepared.table if row.left_out}

    assert left_out(benchmarks=False) == {"bench": "benchmark"}
    aihub = {"exclude": ["aihub", "*-NC-*"]}
    assert left_out(licenses=aihub) == {"nc": "licence CC-BY-NC-4.0", "bench": "licence AIHub"}
    assert left_out(licenses={"exclude": ["non-commercial"]}, benchmarks=False) == {
        "nc": "licence CC-BY-NC-4.0",
        "bench": "benchmark",
    }
    assert left_out(licenses={"allow": ["CC0-*"]}) == {"nc": "licence CC-BY-NC-4.0", "bench": "licence AIHub"}


def test_the_printed_table_says_what_was_left_out_and_what_a_benchmark_does(
    work: Workplace, write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "q", "chosen": "good", "rejected": "call 010-1234-5678"}]
    own = write("own.jsonl", jsonl(rows), "aihub_71760", name="own")
    other = SourceSpec(name="other", adapter="preference", path="not/there", license="CC-BY-NC-4.0")
    prepared = work(spec(own, other, licenses={"exclude": ["non-commercial"]}), "dpo")
    print_data(SimpleNamespace(data={"dpo": prepared}))  # type: ignore[arg-type]
    printed = " ".join(capsys.readouterr().out.split())
    assert "left out: licence CC-BY-NC-4.0" in printed
    assert "personal_data 1 (kept)" in printed
    assert "warning: source 'own' is a benchmark" in printed


def test_rows_of_another_schema_are_refused_with_row_key_and_adapter(work: Workplace, write: Any) -> None:
    row = {"Prompt": "q", "Candidate_answer": {"a": "x", "b": "y"}, "gold": "a"}
    source = write("a.jsonl", jsonl([row]), "aihub_71760")
    words = ("a.jsonl:1#1", "adapter aihub_71760", "no key 'chosen'", "Candidate_answer, Prompt, gold", "option label")
    work.refused(spec(source), "dpo", *words)
    named = write("a.jsonl", jsonl([row, {"odd": 1}]), "aihub_71760", options={"label": "gold"})
    assert work(spec(named), "dpo").table[0].drops == {"wrong_schema": 1}


def test_holding_out_nothing_or_everything_is_refused(work: Workplace, write: Any) -> None:
    a = write("a.jsonl", jsonl([{"text": "가"}]))
    work.refused(spec(a, heldout_per_mille=0.001), "next_token", "holds out none of 1 records")
    work.refused(spec(a, heldout_per_mille=999.999), "next_token", "nothing is left to train on")


def test_an_objective_takes_only_its_kind_of_records(work: Workplace, write: Any) -> None:
    source = write("a.jsonl", jsonl([{"text": "가"}]))
    work.refused(spec(source), "sft", "adapter text gives documents", "objective sft needs conversations")


def test_stages_of_other_lengths_share_a_store_of_documents(work: Workplace, write: Any) -> None:
    source = write("a.jsonl", jsonl([{"text": text} for text in DOCUMENTS]))
    assert work(spec(source, length=100)) == work(spec(source, length=200))


def test_the_micro_world_is_prepared_without_a_data_directory(work: Workplace) -> None:
    train = SourceSpec(name="train", adapter="microworld", options={"part": "instructions", "count": 200})
    held = SourceSpec(name="held", adapter="microworld", options={"part": "instructions", "count": 50, "split": "heldout"})
    prepared = prepare(spec(train, heldout_sources=[held]), "sft", None, work.tokenizer, work.out / "toy", 1)
    assert {row.source: row.drops.get("held_out", 0) for row in prepared.table} == {"train": 0, "held": 0}
    assert prepared.heldout is not None


@given(st.lists(st.text("ab \n가", max_size=4), max_size=30), st.floats(0, 999))
def test_records_that_ask_the_same_are_on_the_same_side(texts: list[str], per_mille: float) -> None:
    splitter = Splitter(per_mille)
    sides: dict[str, set[Any]] = {}
    for text in texts:
        side = splitter.assign(Document(text, "w"))
        if side in ("train", "heldout"):
            sides.setdefault(" ".join(text.split()), set()).add(side)
    assert all(len(found) == 1 for found in sides.values())


def test_a_share_is_held_out_and_a_larger_share_holds_it_too() -> None:
    records = [Conversation((Message("user", str(n)), Message("assistant", "a")), "w") for n in range(3000)]
    held = []
    for per_mille in (20, 50):
        splitter = Splitter(per_mille)
        held.append({record.messages for record in records if splitter.assign(record) == "heldout"})
        assert abs(len(held[-1]) - 3 * per_mille) < 4 * (3 * per_mille) ** 0.5
    assert held[0] < held[1]


@given(st.text("ab\n가", max_size=80), st.integers(1, 20))
def test_pieces_are_the_text(text: str, size: int) -> None:
    assert "".join(pieces(text, size)) == text


def test_texts_for_the_tokenizer_are_thinned_evenly(work: Workplace, write: Any) -> None:
    big = "".join(f"긴 줄 {number} with some words\n" for number in range(9000))
    sources = [write("big.txt", big, name="big"), write("b.jsonl", jsonl([{"text": f"b{n} " * 500} for n in range(40)]), name="b")]
    everything = list(iter_texts(open_sources(sources, work.data_dir), 10**9, 1))
    assert len(everything) == 41
    total = sum(len(text.encode()) for text in everything)
    thinned = list(iter_texts(open_sources(sources, work.data_dir), total // 4, 1))
    assert thinned == list(iter_texts(open_sources(sources, work.data_dir), total // 4, 1))
    assert total / 4 * 0.9 < sum(len(text.encode()) for text in thinned) <= total / 4
    assert all(text in big or text.startswith("b") for text in thinned)
    share = sum(len(text.encode()) for text in thinned if text.startswith("b")) / sum(len(f"b{n} " * 500) for n in range(40))
    assert 0.15 < share < 0.35


def test_conversations_pairs_limits_and_repeats_give_texts(work: Workplace, write: Any) -> None:
    chats = write("a.jsonl", jsonl([conversation("q", "a"), conversation("r", "b")]), "messages", name="a", limit=1, repeat=2)
    pairs = write("b.jsonl", jsonl([{"prompt": "p", "chosen": "c", "rejected": "d"}]), "preference", name="b")
    assert list(iter_texts(open_sources([chats, pairs], work.data_dir), 1000, 1)) == ["q", "q", "a", "a", "p", "c", "d"]
    with pytest.raises(UserError, match="source 'source': gives no text"):
        list(iter_texts(open_sources([write("c.jsonl", jsonl([{"x": 1}]))], work.data_dir), 1000, 1))


def test_a_damaged_memory_of_what_is_there_is_made_again_or_named(work: Workplace, write: Any) -> None:
    source = write("a.jsonl", "".join(json.dumps({"text": f"a tree {number}"}) + "\n" for number in range(9)))
    data = DataSpec(sources=[source], sequence_length=16)
    first = work(data)
    (work.out / "out" / "file-hashes.json").write_text(json.dumps(dict.fromkeys(map(str, work.data_dir.iterdir()), 5)))
    assert work(data).fingerprint == first.fingerprint
    next(first.train.glob("*.ds")).unlink()
    with pytest.raises(UserError, match=r"\.ds"):
        work(data)
