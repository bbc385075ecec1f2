"""Held-out figures by source and language are those of the sources alone."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from keural.data.loading.stream import Stream
from keural.data.records import Document
from keural.data.tokens.encode import Encoded
from keural.data.tokens.store import PAIR_WEIGHTS, StoreWriter, TokenStore
from keural.data.tokens.store_builder import StoreBuilder
from keural.files import atomic_directory
from keural.train.stage.heldout import evaluate, sources_of
from keural.train.stage.training import train_stage
from tests.helpers.train_small import KIND, LENGTH, SHA, VOCAB, metrics_of, open_run, small_job, write_store

SIZES = {"wiki": 5, "chat": 3, "forum": 4}
LANGUAGES = {"wiki": "ko", "chat": "en", "forum": "ko"}


def write_sources(directory: Path, objective: str, weights: list[float] | None = None) -> dict[str, Path]:
    """A store of three sources, and each source as a store of its own."""
    stores = {name: write_store(directory / name, objective, size, seed=7 + size) for name, size in SIZES.items()}
    per_record = 2 if objective == "dpo" else 1
    sections = [{"source": name, "sequences": per_record * size} for name, size in SIZES.items()]
    meta = {"sections": sections, "sources": [{"source": name, "language": language} for name, language in LANGUAGES.items()]}
    with atomic_directory(directory / "all") as path, StoreWriter(path, SHA, VOCAB, KIND[objective], meta) as writer:  # type: ignore[arg-type]
        for store in map(TokenStore.open, stores.values()):
            for number in range(store.num_sequences):
                writer.add(store.sequence(number), store.loss_mask(number))
        if weights:
            (path / PAIR_WEIGHTS).write_bytes(np.array(weights, dtype="<f4").tobytes())
            writer.close(extra=[PAIR_WEIGHTS])
    return stores | {"all": directory / "all"}


def figures_of(trainer: Any, store: Path, first: int = 0) -> dict[str, float]:
    """Of a store whose first sequence is sequence `first` of the store of all sources: each has a reference value of its own."""

    def reference(sequences: np.ndarray) -> torch.Tensor:
        return -(torch.from_numpy((sequences + first).astype("float32")) ** 1.5)

    size = {"batch_pairs": 1} if trainer.stage.objective == "dpo" else {"batch_rows": 1}
    stream = Stream(TokenStore.open(store), trainer.stage.objective, LENGTH, **size)
    return evaluate(trainer, stream, reference if trainer.stage.objective == "dpo" else None).figures


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_each_source_has_the_figures_of_its_own_store(tmp_path: Path, objective: str) -> None:
    stores = write_sources(tmp_path / "stores", objective)
    trainer = open_run(small_job(tmp_path, objective)).trainer
    whole = figures_of(trainer, stores["all"])
    firsts = {"wiki": 0, "chat": 10, "forum": 16}
    alone = {name: figures_of(trainer, stores[name], firsts[name]) for name in SIZES}
    for name, figures in alone.items():
        for key, value in figures.items():
            assert whole[f"source/{name}/{key}"] == pytest.approx(value, rel=1e-5, abs=1e-6), (name, key)
    items = {name: figures["items"] for name, figures in alone.items()}
    assert whole["items"] == sum(items.values())
    korean = (alone["wiki"]["loss"] * items["wiki"] + alone["forum"]["loss"] * items["forum"]) / (items["wiki"] + items["forum"])
    assert whole["language/ko/loss"] == pytest.approx(korean, rel=1e-5)
    assert whole["language/en/loss"] == pytest.approx(alone["chat"]["loss"], rel=1e-5)
    assert alone["wiki"]["loss"] != pytest.approx(alone["chat"]["loss"], rel=1e-3)


def test_each_conversation_has_the_loss_of_its_own_labels(tmp_path: Path) -> None:
    store = TokenStore.open(write_sources(tmp_path / "stores", "sft")["all"])
    trainer = open_run(small_job(tmp_path, "sft")).trainer
    items = evaluate(trainer, Stream(store, "sft", LENGTH, batch_rows=2), None).items
    assert items is not None
    for number in range(store.num_sequences):
        ids, trained = torch.tensor(store.sequence(number).astype("int64")), torch.tensor(store.loss_mask(number))[1:] > 0
        nats = F.cross_entropy(trainer.policy.model(ids[None]).logits[0, :-1], ids[1:], reduction="none")[trained]
        assert items[:, number] == pytest.approx([nats.sum().item(), len(nats)], rel=1e-5), number


def test_weights_of_pairs_count_in_their_source(tmp_path: Path) -> None:
    weights = [1.0] * 5 + [0.5, 0.25, 0.25] + [1.0] * 4
    stores = write_sources(tmp_path / "stores", "dpo", weights)
    figures = figures_of(open_run(small_job(tmp_path, "dpo")).trainer, stores["all"])
    assert figures["source/chat/items"] == pytest.approx(1.0)
    assert figures["items"] == pytest.approx(10.0)


def test_a_store_of_one_source_has_no_figures_by_source(tmp_path: Path) -> None:
    assert sources_of(Stream(TokenStore.open(write_store(tmp_path / "one", "sft", 4)), "sft", LENGTH, batch_rows=1)) is None


def test_documents_with_their_texts_have_bits_per_byte_and_those_without_have_none(tmp_path: Path) -> None:
    """As every token behind the first one of a document costs, over the bytes of the texts, one of which is there twice."""
    documents = {"ab\nc": [4, 9, 17, 95], "고양이": [4, 30, 31, 32, 33, 95], "x" * 40: [4, *range(10, 40), 95]}
    with StoreBuilder(tmp_path / ".held", "documents", keep_texts=True) as builder:
        for number, (text, ids) in enumerate(documents.items()):
            builder.add(Encoded(Document(text, "here"), ((ids, None),)), repeat=1 + (number == 1), source="web")  # type: ignore[arg-type]
        builder.write_store(tmp_path / "held", SHA, VOCAB, {}, 0)
    trainer = open_run(small_job(tmp_path)).trainer
    model = trainer.policy.model
    nats = {
        text: F.cross_entropy(model(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]), reduction="sum").item()
        for text, ids in documents.items()
    }

    stream = Stream(TokenStore.open(tmp_path / "held"), "next_token", 64, batch_rows=1)
    found = evaluate(trainer, stream, None).figures

    size = 4 + 2 * 9 + 40
    assert found["bits_per_byte"] == pytest.approx((sum(nats.values()) + nats["고양이"]) / math.log(2) / size, rel=1e-5)
    without = Stream(TokenStore.open(tmp_path / "store"), "next_token", 64, batch_rows=1)
    assert "bits_per_byte" not in evaluate(trainer, without, None).figures


def test_a_stage_keeps_them_and_says_the_whole_figures(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stores = write_sources(tmp_path / "stores", "sft")
    job = small_job(tmp_path, "sft", train={"steps": 1, "warmup_steps": 0})
    result = train_stage(type(job)(**{**job.__dict__, "heldout_store": stores["all"]}))
    (line,) = [line["heldout"] for line in metrics_of(job) if "heldout" in line]
    assert line == result.heldout
    assert "source/wiki/loss" in line
    before, after = [line for line in capfd.readouterr().err.splitlines() if "held-out" in line]
    assert re.fullmatch(r"small: held-out loss \d\.\d{4} before the first step", before)
    assert after == f"small: held-out loss {line['loss']:.4f}"


@pytest.mark.parametrize(("order", "named"), [(["a", "a", "b"], {"a": (0, 2), "b": (2, 3)}), (["a", "b", "a"], {})])
def test_a_held_out_store_says_which_records_are_of_which_source(tmp_path: Path, order: list[str], named: dict[str, Any]) -> None:
    """Where a source comes back after another one, it does not."""
    with StoreBuilder(tmp_path / ".held", "conversations", named=True) as builder:
        for number, source in enumerate(order):
            builder.add(Encoded(None, (([5, 6 + number], [0, 1]),)), repeat=1, source=source)  # type: ignore[arg-type]
        builder.write_store(tmp_path / "held", SHA, VOCAB, {}, 0)
    store = TokenStore.open(tmp_path / "held")
    assert store.sections == named
    assert [store.sequence(number)[1] for number in range(3)] == [6, 7, 8]
