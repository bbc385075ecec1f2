"""Items that a stage was trained on are found in its token store, and beside the score stands that of the clean part."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from keural.data.loading.corpus import Corpus
from keural.data.records import Document, EvaluationItem, PreferencePair
from keural.data.tokens.store import StoreWriter, TokenStore
from keural.data.tokens.texts import stored_texts
from keural.errors import UserError
from keural.evaluate.contamination import Search, Seen, TrainingText, beside, looked_for, remembered_search, search, training_text
from keural.evaluate.results.records import ItemResult, TaskResults
from keural.evaluate.statistics import wilson
from keural.tokenizer import KeuralTokenizer, Message, render

VOCABULARY = (
    "cat sees small red house two blue birds garden Monday morning eleven 고양이는 작은 빨간 집과 파란 새 마리를 정원에서 봅니다"
)
WORDS = VOCABULARY.split()


def _text(seed: int, words: int = 24) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def _item(number: int) -> EvaluationItem:
    return EvaluationItem(_text(number), f"test.jsonl:{number}", choices=(_text(1000 + number, 4), _text(2000 + number, 4)))


ITEMS = {f"item-{number}": _item(number) for number in range(200)}
PLANTED = [f"item-{number}" for number in range(0, 200, 4)]
"""50 of them."""
OTHER = [_text(10_000 + number, 60) for number in range(100)]


def _store(directory: Path, tokenizer: KeuralTokenizer, kind: str, texts: list[str]) -> Corpus:
    with StoreWriter(directory, tokenizer.sha256, tokenizer.vocab_size, kind) as store:  # type: ignore[arg-type]
        for text in texts:
            if kind == "documents":
                store.add([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id])
                continue
            question, _, answer = text.partition(" | ")
            chat = render(tokenizer, [Message("system", "Be brief."), Message("user", question), Message("assistant", answer)])
            store.add(chat.ids, chat.mask)
            if kind == "pairs":
                other = render(tokenizer, [Message("user", "Why?"), Message("assistant", "No.")])
                store.add(other.ids, other.mask)
    return Corpus((directory,))


def _results(right: set[str]) -> TaskResults:
    items = [ItemResult(key, None, float(key in right), "q", "e", "g", None, 1) for key in ITEMS]
    return TaskResults("arc_challenge", "en", "choice", 0.25, "arc", items)


@pytest.mark.parametrize("kind", ["documents", "conversations", "pairs"])
def test_fifty_planted_items_are_found_and_no_others(kind: str, tmp_path: Path, tokenizer: KeuralTokenizer) -> None:
    planted = [f"{ITEMS[key].question} | {ITEMS[key].choices[0]}" for key in PLANTED]
    mixed = random.Random(0).sample(planted + OTHER, 150)
    corpus = _store(tmp_path / "train", tokenizer, kind, mixed)
    clean = _store(tmp_path / "clean", tokenizer, "documents", OTHER)
    looked = search(
        {"arc": ITEMS},
        [training_text("pretrain", "a", clean, tokenizer), training_text("sft", "b", corpus, tokenizer)],
    )
    assert looked.stages["pretrain"] == Seen({})
    assert sorted(looked.stages["sft"].items["arc"]) == sorted(PLANTED)
    # A model that learned these 50 by heart, and knows a quarter of the others.
    figures = beside(_results({*PLANTED, *list(ITEMS)[1:150:4]}), looked)
    assert (figures["found"], figures["by_stage"], figures["unknown"], figures["too_short"]) == (50, {"sft": 50}, {}, 0)
    assert sorted(figures["items"]) == sorted(PLANTED)
    expected = wilson(38, 150)
    assert figures["clean"] == {"score": expected.value, "low": expected.low, "high": expected.high, "n": 150}
    assert beside(_results(set()), looked.until(["pretrain"]))["found"] == 0


def test_a_question_split_over_turns_is_found(tmp_path: Path, tokenizer: KeuralTokenizer) -> None:
    item = EvaluationItem("Who sees the cat?", "x:1", answers=("two blue birds in the garden",))
    corpus = _store(tmp_path / "train", tokenizer, "conversations", ["Who sees the cat? | two blue birds in the garden"])
    looked = search({"task": {"a": item}}, [training_text("sft", "b", corpus, tokenizer)])
    assert looked.stages["sft"].items == {"task": {"a"}}


@pytest.mark.parametrize("kind", ["documents", "conversations", "pairs"])
def test_a_store_gives_its_texts_back(kind: str, tmp_path: Path, tokenizer: KeuralTokenizer) -> None:
    texts = ["the cat\nsees | 안녕하세요 <|im_end|>", " two  birds | "]
    corpus = _store(tmp_path / "train", tokenizer, kind, texts)
    found = list(stored_texts(TokenStore.open(corpus.paths[0]), tokenizer))
    if kind == "documents":
        assert found == texts
    else:
        assert found[:: 1 if kind == "conversations" else 2] == [f"Be brief.\n{text.replace(' | ', chr(10))}" for text in texts]


def test_stages_with_the_same_data_are_read_once() -> None:
    read: list[int] = []

    def texts() -> Iterator[str]:
        read.append(1)
        yield ITEMS["item-3"].question

    looked = search({"t": ITEMS}, [TrainingText("a", "same", texts), TrainingText("b", "same", texts)])
    assert len(read) == 1
    assert looked.stages["a"].items == looked.stages["b"].items == {"t": {"item-3"}}


def test_one_text_may_hold_many_items() -> None:
    everything = "\n\n".join(item.question for item in ITEMS.values())
    looked = search({"t": ITEMS}, [TrainingText("a", "a", lambda: [everything])])
    assert looked.stages["a"].items["t"] == ITEMS.keys()
    assert beside(_results(set()), Search({"a": Seen({"arc": frozenset(ITEMS)})}, {}))["clean"] is None


def test_text_that_is_gone_is_said_and_not_taken_for_clean(tmp_path: Path, tokenizer: KeuralTokenizer) -> None:
    gone = training_text("pretrain", "a", Corpus((tmp_path / "nowhere",)), tokenizer)

    def later() -> Iterator[str]:
        yield ITEMS["item-3"].question
        raise UserError("broken half-way")

    looked = search({"arc": ITEMS}, [gone, TrainingText("sft", "b", later)])
    figures = beside(_results(set()), looked)
    assert figures["found"] == 0
    assert "nowhere" in figures["unknown"]["pretrain"]
    assert figures["unknown"]["sft"] == "broken half-way"


def test_items_that_are_too_short_are_counted() -> None:
    looked = search({"arc": {"item-0": EvaluationItem("짧다", "x:1"), "item-1": _item(1)}}, [])
    assert looked.too_short == {"arc": {"item-0"}}
    assert beside(_results(set()), looked)["too_short"] == 1


def test_what_was_searched_once_is_not_searched_again(tmp_path: Path) -> None:
    read: list[str] = []

    def stage(name: str, identity: str, *texts: str) -> TrainingText:
        def all_texts() -> Iterator[str]:
            read.append(name)
            yield from texts

        return TrainingText(name, identity, all_texts)

    trained = [stage("pretrain", "a"), stage("sft", "b", ITEMS["item-3"].question, ITEMS["item-4"].question)]
    short = {"item-0": EvaluationItem("짧다", "x:1"), **{key: ITEMS[key] for key in ("item-3", "item-5")}}
    first = remembered_search({"arc": short}, trained, tmp_path)
    assert first.stages["sft"].items == {"arc": {"item-3"}}
    assert first.too_short == {"arc": {"item-0"}}
    read.clear()
    assert remembered_search({"arc": short}, trained, tmp_path) == first
    assert read == []
    more = remembered_search({"arc": short, "other": {"x": ITEMS["item-4"]}}, trained, tmp_path)
    assert read == ["pretrain", "sft"]
    assert more.stages["sft"].items == {"arc": {"item-3"}, "other": {"x"}}
    gone = remembered_search({"new": short}, [TrainingText("sft", "b", _broken)], tmp_path)
    assert gone.stages["sft"].unknown == "gone"
    assert remembered_search({"new": short}, trained, tmp_path).stages["sft"].items == {"new": {"item-3"}}


def _broken() -> Iterator[str]:
    raise UserError("gone")


def test_pairs_and_texts_are_looked_for_with_all_that_they_say() -> None:
    pair = PreferencePair((Message("user", _text(1)),), _text(2), _text(3), "x:1")
    for text in (_text(1), _text(2), _text(3)):
        assert search({"p": {"a": looked_for(pair)}}, [TrainingText("s", "s", lambda text=text: [text])]).stages["s"].items  # type: ignore[misc]
    document = Document(_text(4), "x:2")
    assert search({"d": {"a": looked_for(document)}}, [TrainingText("s", "s", lambda: [_text(4)])]).stages["s"].items
