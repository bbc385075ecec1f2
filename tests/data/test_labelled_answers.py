"""Single answers with a label: which rows give them, what a store of them holds, and what each is compared with."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keural.data.adapters import ADAPTERS
from keural.data.loading.stream import Stream
from keural.data.prepare import prepare
from keural.data.prepared import Prepared
from keural.data.records import Conversation, Drop, PreferencePair, answers_of
from keural.data.tokens.mismatched import Prompts
from keural.data.tokens.store import LABELS, TokenStore
from keural.errors import UserError
from keural.recipe import DataSpec, SourceSpec
from keural.tokenizer import KeuralTokenizer
from keural.tokenizer.message import Message

Prepare = Callable[..., Prepared]
Outcome = tuple[tuple[str, ...], str, bool] | str
"""What is asked, the answer, and whether it is a good one; or why there is none."""
LENGTH = 64


def outcome(adapter: str, row: Any, **settings: Any) -> Outcome:
    source = SourceSpec(name="s", adapter=adapter, **{"as_labels": True, **settings})
    record = ADAPTERS[adapter](row, source, "rows.jsonl:1")
    if isinstance(record, Drop):
        return record.reason
    assert isinstance(record, Conversation)
    assert record.good is not None
    *before, answer = record.messages
    assert [turn.is_trained for turn in record.messages] == [False] * len(before) + [True]
    return tuple(turn.content for turn in before), answer.content, record.good


@pytest.fixture
def prepared(tmp_path: Path, tokenizer: KeuralTokenizer) -> Prepare:
    def make(rows: Sequence[Any], adapter: str = "kto", heldout: float = 0, objective: str = "kto", **settings: Any) -> Prepared:
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        source = SourceSpec(
            name="s", adapter=adapter, path="rows.jsonl", **{"as_labels": objective == "kto", "max_drop": 1, **settings}
        )
        spec = DataSpec(sources=[source], sequence_length=LENGTH, heldout_per_mille=heldout)
        return prepare(spec, objective, tmp_path / "data", tokenizer, tmp_path / "prepared", seed=1)  # type: ignore[arg-type]

    return make


def kto_rows(number: int, of_each: int = 1) -> list[dict[str, Any]]:
    """Prompts with answers, every other one a good one."""
    pairs = [(n, k) for n in range(number) for k in range(of_each)]
    return [{"prompt": f"q {n}", "completion": f"a {n} {k}", "label": (n + k) % 2 == 0} for n, k in pairs]


@pytest.mark.parametrize("good", [True, False])
@pytest.mark.parametrize(
    ("adapter", "row", "options"),
    [
        ("kto", {"prompt": "q", "completion": "a", "label": None}, {}),
        ("kto", {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}, {}),
        ("messages", {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, {}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, {"label": "kto_tag"}),
        ("alpaca", {"instruction": "q", "output": "a"}, {"label": "thumb"}),
        ("qa", {"question": "q", "answer": "a"}, {}),
        ("prompt_completion", {"prompt": "q", "completion": "a"}, {}),
    ],
)
def test_every_adapter_of_conversations_gives_answers_of_both_labels(
    adapter: str, row: dict[str, Any], options: dict[str, Any], good: bool
) -> None:
    row = {**row, options.get("label", "label"): good}
    assert outcome(adapter, row, options=options) == (("q",), "a", good)
    for_sft = outcome(adapter, row, options=options, as_labels=False) if not good else None
    assert for_sft in (None, "label_false"), "what is learned alike has no bad answers"


@pytest.mark.parametrize(
    ("value", "good"),
    [
        *((value, True) for value in (1, 1.0, np.True_, "true", "👍", "thumbs_up", "+", "desirable", "chosen")),
        *((value, False) for value in (0, "False", "👎", "Thumbs_Down", "-", "undesirable", "rejected")),
    ],
)
def test_labels_as_public_sets_write_them(value: Any, good: bool) -> None:
    for adapter, row in (("kto", {"prompt": "q", "completion": "a"}), ("qa", {"question": "q", "answer": "a"})):
        assert outcome(adapter, {**row, "label": value}) == (("q",), "a", good)


@pytest.mark.parametrize("value", [-1, 2, 0.5, "meh", "yes", [True], {"good": 1}])
def test_a_label_that_is_not_a_label_refuses_its_source(prepared: Prepare, value: Any) -> None:
    assert outcome("kto", {"prompt": "q", "completion": "a", "label": value}) == "undeclared_value"
    with pytest.raises(UserError, match=r"label is .*not a declared meaning .*options: \{labels: ") as error:
        prepared([*kto_rows(4), {"prompt": "q", "completion": "a", "label": value}])
    assert "\n" not in str(error.value)


def test_other_values_are_declared() -> None:
    options = {"label": "score", "labels": {"1": True, "-1": False}}
    rows = [{"prompt": "q", "completion": "a", "score": score} for score in (1, -1)]
    assert [outcome("kto", row, options=options) for row in rows] == [(("q",), "a", True), (("q",), "a", False)]


@pytest.mark.parametrize("row", [{}, {"label": None}, {"label": float("nan")}, {"label": ""}])
@pytest.mark.parametrize("adapter", ["kto", "qa", "messages"])
def test_a_row_without_a_label_gives_no_answer(adapter: str, row: dict[str, Any]) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    whole = {"prompt": "q", "completion": "a", "question": "q", "answer": "a", "messages": turns}
    assert outcome(adapter, {**whole, **row}) == "missing_label"


@pytest.mark.parametrize(
    ("adapter", "row", "reason"),
    [
        ("kto", {"prompt": "q", "completion": "", "label": True}, "empty_turn"),
        ("kto", {"prompt": "q", "completion": " \n ", "label": False}, "empty_turn"),
        ("kto", {"prompt": "", "completion": "a", "label": False}, "empty_turn"),
        ("kto", {"prompt": "q", "completion": [], "label": True}, "completion_does_not_begin_with_assistant"),
        ("qa", {"question": "q", "answer": "a", "label": True, "kto_tag": False}, "fields_differ"),
        ("kto", {"prompt": "q", "completion": "a", "label": False, "reasoning": "hm"}, "has_reasoning"),
        ("qa", {"question": "q", "answer": "a", "label": True, "train": False}, "not_trained"),
    ],
)
def test_rows_whose_label_is_of_no_answer(adapter: str, row: dict[str, Any], reason: str) -> None:
    assert outcome(adapter, row) == reason


def test_a_label_is_of_the_last_answer_alone() -> None:
    turns = [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    messages = [{"role": role, "content": text} for role, text in turns]
    assert outcome("messages", {"messages": messages, "label": False}) == (("q", "a", "r"), "b", False)
    assert outcome("messages", {"messages": messages[:3], "label": False}) == "ends_with_user"
    several = {"prompt": messages[:1], "completion": messages[1:], "label": True}
    assert outcome("kto", several) == "label_of_several_turns"


TURN_LABELS: list[tuple[dict[str, Any], Any]] = [
    ({"label": False}, False),
    ({"label": "👎"}, False),
    ({"kto_tag": 1}, True),
    ({"label": None}, "missing_label"),
    ({"label": "meh"}, "undeclared_value"),
]


@pytest.mark.parametrize(("said", "good"), TURN_LABELS)
def test_a_label_inside_the_last_answer_is_the_rows(said: dict[str, Any], good: Any) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **said}]
    expected = good if isinstance(good, str) else (("q",), "a", good)
    assert outcome("messages", {"messages": turns}) == expected
    assert outcome("kto", {"prompt": turns[:1], "completion": turns[1:]}) == expected
    assert outcome("sharegpt", {"conversations": turns}, options={"label": "label" if "label" in said else "kto_tag"}) == expected


def test_a_label_inside_a_turn_is_of_that_turn_and_agrees_with_the_rows() -> None:
    question, bad, good = (
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "label": False},
        {"role": "assistant", "content": "a", "label": True},
    )
    assert outcome("messages", {"messages": [question, bad, question, good]}) == (("q", "a", "q"), "a", True)
    assert outcome("messages", {"messages": [question, good, question, bad]}) == (("q", "a", "q"), "a", False)
    assert outcome("messages", {"messages": [question, good | {"label": None}, question, good], "label": False}) == "fields_differ"
    assert outcome("messages", {"messages": [{**question, "label": True}, good | {"label": None}]}) == "missing_label"
    assert outcome("kto", {"prompt": [question, bad, question], "completion": "b"}) == "missing_label"


def test_a_label_in_words_is_read_and_not_listed_as_left(prepared: Prepare) -> None:
    rows = [row | {"label": "👍" if row["label"] else "👎"} for row in kto_rows(6)]
    table = prepared([{"question": row["prompt"], "answer": row["completion"], "label": row["label"]} for row in rows], "qa").table[
        0
    ]
    assert (table.kept, table.not_read) == (6, None)


def test_a_ratio_of_lengths_is_of_pairs(prepared: Prepare) -> None:
    with pytest.raises(UserError, match="max_length_ratio is for pairs; the source is taken as single answers"):
        prepared(kto_rows(4), max_length_ratio=2.0)


class TestPairsAsAnswers:
    """A source of pairs that is taken as labelled answers."""

    PAIR = PreferencePair((Message("user", "q"),), "good", "bad", "r:1", "en", id="7")

    def test_the_chosen_one_is_good_and_the_rejected_one_is_bad(self) -> None:
        found = list(answers_of(self.PAIR))
        assert [(each.messages[-1].content, each.good) for each in found] == [("good", True), ("bad", False)]
        assert all(each.messages[0] == Message("user", "q", trained=None) for each in found)
        assert len({each.id for each in found}) == 2, "they are no duplicates of each other"

    def test_a_source_gives_two_answers_for_a_pair(self, prepared: Prepare) -> None:
        rows = [{"prompt": f"q {n}", "chosen": f"good {n}", "rejected": f"bad {n}", "id": n} for n in range(6)]
        store = TokenStore.open(prepared(rows, "preference", id_field="id").train)
        assert store.labels is not None
        assert (store.num_records, int(store.labels.sum())) == (12, 6)

    def test_an_answer_with_both_labels_is_there_once(self, prepared: Prepare) -> None:
        rows = [{"prompt": f"q {n}", "chosen": "best", "rejected": "mean"} for n in range(4)]
        rows += [{"prompt": "q 0", "chosen": "mean", "rejected": "worst"}]
        table = prepared(rows, "preference").table[0]
        assert (table.kept, table.drops) == (9, {"other_label": 1})

    def test_documents_have_no_labels(self, prepared: Prepare) -> None:
        with pytest.raises(UserError, match=r"source 's': as_labels is of conversations and pairs; adapter text gives documents"):
            prepared(["a"], "text", format="text")


class TestStore:
    """What `train/` of prepared answers holds."""

    def test_sequences_and_labels_are_those_of_the_rows(self, prepared: Prepare, tokenizer: KeuralTokenizer) -> None:
        store = TokenStore.open(prepared(kto_rows(7)).train)
        assert store.kind == "answers"
        assert (store.num_records, store.num_sequences) == (7, 14)
        assert store.labels is not None
        found = Counter()
        for record in range(7):
            text = tokenizer.decode(answer_of(store, 2 * record))
            found[int(text.split()[1])] = int(store.labels[record])
        assert found == {n: n % 2 == 0 for n in range(7)}

    def test_each_answer_stands_once_behind_another_prompt(self, prepared: Prepare) -> None:
        """However many answers a prompt has, and though they follow each other in the file."""
        store = TokenStore.open(prepared(kto_rows(5, of_each=4)).train)
        own, other = ([parts(store, 2 * record + side) for record in range(20)] for side in (0, 1))
        assert [prompt for prompt, _ in own] == [prompt for prompt, _ in other]
        assert sorted(answer for _, answer in own) == sorted(answer for _, answer in other)
        prompts_of: dict[Any, set[Any]] = {}
        for prompt, answer in own:
            prompts_of.setdefault(answer, set()).add(prompt)
        assert all(prompt not in prompts_of[answer] for prompt, answer in other)

    def test_a_foreign_answer_that_does_not_fit_is_cut(self, prepared: Prepare) -> None:
        rows = [{"prompt": "q " * 20, "completion": "a", "label": True}, {"prompt": "q", "completion": "b " * 20, "label": False}]
        store = TokenStore.open(prepared(rows).train)
        lengths = sorted(store.lengths().reshape(-1, 2)[:, 1].tolist())
        assert lengths[1] == LENGTH
        assert store.longest == LENGTH

    def test_an_answer_that_does_not_fit_is_dropped_whole(self, prepared: Prepare) -> None:
        long = [{"prompt": "q", "completion": "b " * 99, "label": False}, {"prompt": "q " * 99, "completion": "b", "label": False}]
        table = prepared([*kto_rows(4), *long]).table[0]
        assert (table.kept, table.drops) == (4, {"answer_too_long": 1, "prompt_too_long": 1})

    def test_more_data_changes_few_partners(self, prepared: Prepare) -> None:
        before, after = (TokenStore.open(prepared(kto_rows(n)).train) for n in (30, 31))
        records = [{(parts(s, 2 * r), parts(s, 2 * r + 1)) for r in range(s.num_records)} for s in (before, after)]
        assert len(records[0] - records[1]) == 1

    @pytest.mark.parametrize("damage", [b"", b"\x00", b"\x02" * 7])
    def test_damaged_labels_are_refused(self, prepared: Prepare, damage: bytes) -> None:
        directory = prepared(kto_rows(7)).train
        (directory / LABELS).write_bytes(damage)
        with pytest.raises(UserError, match=LABELS):
            TokenStore.open(directory)

    def test_answers_to_one_prompt_alone_cannot_be_compared(self, prepared: Prepare) -> None:
        rows = [{"prompt": "q", "completion": f"a {n}", "label": True} for n in range(3)] + kto_rows(2)
        with pytest.raises(UserError, match=r"3 of 5 labelled answers are to the same prompt"):
            prepared(rows)

    def test_joined_stores_keep_their_labels(self, prepared: Prepare) -> None:
        store = TokenStore.open(prepared(kto_rows(7)).train)
        joined = TokenStore.join({"a": store, "b": store})
        assert joined.labels is not None
        assert store.labels is not None
        assert joined.labels.tolist() == [*store.labels.tolist()] * 2

    def test_the_same_rows_still_give_only_good_ones_to_sft(self, prepared: Prepare) -> None:
        table = prepared(kto_rows(8), objective="sft").table[0]
        assert (table.kept, table.drops) == (4, {"label_false": 4})


def answer_of(store: TokenStore, sequence: int) -> list[int]:
    return store.sequence(sequence)[store.loss_mask(sequence) == 1].tolist()


def parts(store: TokenStore, sequence: int) -> tuple[bytes, bytes]:
    """Prompt and answer of a sequence."""
    ids, begin = store.sequence(sequence), int(store.loss_mask(sequence).argmax())
    return ids[:begin].tobytes(), ids[begin:].tobytes()


class TestPartners:
    """Which answer each record is compared with."""

    @pytest.mark.parametrize("sizes", [[1, 1], [2, 2], [1] * 9, [4, 1, 1, 1, 1], [3, 2, 1], [5, 5]])
    def test_never_one_to_the_same_prompt_and_each_exactly_once(self, sizes: list[int]) -> None:
        prompts, owners = Prompts(), []
        for prompt, size in enumerate(sizes):
            for answer in range(size):
                prompts.add([prompt, 50, answer], [0, 0, 1])
                owners.append(prompt)
        found = prompts.partners.tolist()
        assert sorted(found) == list(range(len(owners)))
        assert all(owners[record] != owners[partner] for record, partner in enumerate(found))

    @pytest.mark.parametrize("sizes", [[1], [3], [3, 2], [9, 1, 1]])
    def test_a_prompt_of_more_than_half_is_refused(self, sizes: list[int]) -> None:
        prompts = Prompts()
        for prompt, size in enumerate(sizes):
            for answer in range(size):
                prompts.add([prompt, answer], [0, 1])
        with pytest.raises(UserError, match="to the same prompt"):
            _ = prompts.partners


class TestBatches:
    """Rows of a step."""

    @pytest.fixture
    def stream(self, prepared: Prepare) -> Stream:
        return Stream(TokenStore.open(prepared(kto_rows(11)).train), "kto", LENGTH, batch_pairs=4, seed=3)

    def test_a_step_has_its_answers_and_what_they_are_compared_with(self, stream: Stream) -> None:
        seen: Counter[int] = Counter()
        for step in range(11):
            batch = stream.batch(step)
            assert batch.mismatched is not None
            own, other = batch.pair_sequences[0] // 2, batch.mismatched.pair_sequences[0] // 2
            assert sorted(own.tolist()) == sorted(other.tolist())
            assert len(own) == 4
            seen.update(own.tolist())
        assert seen == dict.fromkeys(range(11), 4)

    def test_places_labels_and_masks_are_those_of_the_store(self, stream: Stream) -> None:
        store = stream.store
        assert isinstance(store, TokenStore)
        assert store.labels is not None
        for batch in (stream.batch(0), stream.batch(0).mismatched):
            assert batch is not None
            assert batch.desirable is not None
            for (row, begin, end), sequence, good in zip(
                batch.pairs.tolist(), batch.pair_sequences[0], batch.desirable, strict=True
            ):
                assert batch.input_ids[row, begin:end].tolist() == store.sequence(sequence).tolist()
                assert (batch.labels[row, begin : end - 1] >= 0).tolist() == (store.loss_mask(sequence)[1:] == 1).tolist()
                assert good == store.labels[sequence // 2]

    @pytest.mark.parametrize("world", [2, 3, 5])
    def test_ranks_share_a_step(self, stream: Stream, world: int) -> None:
        whole, shares = stream.batch(1), [stream.batch(1, rank, world) for rank in range(world)]
        for kind in (0, 1):
            expected = sorted(whole.parts[kind].pair_sequences[0].tolist())
            assert sorted(s for share in shares for s in share.parts[kind].pair_sequences[0].tolist()) == expected
            assert len({share.parts[kind].input_ids.shape for share in shares}) == 1

    def test_once_shows_every_answer_once(self, stream: Stream) -> None:
        batches = list(stream.batches_once(2))
        for kind in (0, 1):
            assert sorted(s for batch in batches for s in batch.parts[kind].pair_sequences[0].tolist()) == list(range(kind, 22, 2))
