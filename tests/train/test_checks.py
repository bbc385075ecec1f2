"""What a stage refuses before its first step: each check fires on a store that was made for it, whoever made the store."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from keural.data.loading.stream import Stream
from keural.data.tokens.store import LABELS, StoreWriter, TokenStore
from keural.errors import UserError
from keural.files import atomic_directory
from keural.recipe import OBJECTIVES, ChecksSpec
from keural.train.checks.probes import check_isolation, check_references
from keural.train.checks.record import CHECKS_FILE, ChecksFile
from keural.train.checks.stores import CHECKS, check_store
from keural.train.micro_batches import MicroBatch
from keural.train.network.engine import Engine
from keural.train.network.policy import Policy, PolicyOutput
from keural.train.stage.training import make_references, train_stage
from tests.helpers.train_small import END, LENGTH, SHA, VOCAB, metrics_of, open_run, small_config, small_job, write_store

Row = tuple[list[int], list[int]]
GOOD: Row = ([5, 6, 7, END], [0, 0, 1, 1])
OTHER: Row = ([5, 6, 8, END], [0, 0, 1, 1])
EMPTY: Row = ([5, 6, 7, END], [0, 0, 0, 0])
FIRST_ONLY: Row = ([5, 6, 7, END], [1, 0, 0, 0])
"""A mask over the first token alone, which nothing predicts."""
OPEN: Row = ([5, 6, 7, END, 9], [0, 0, 1, 0, 0])
CUT: Row = ([5, 6, 7, 8], [0, 0, 1, 1])
LINE_END: Row = ([5, 6, 7, END, 9], [0, 0, 1, 1, 1])
TWO_TURNS: Row = ([5, 7, 8, END, 5, 6, 7, END], [0, 1, 1, 0, 0, 0, 1, 1])
"""Two trained answers, of which the first has its end outside of the mask."""


def write(directory: Path, kind: Any, rows: list[Row], meta: dict[str, Any] | None = None) -> Path:
    with atomic_directory(directory) as path, StoreWriter(path, SHA, VOCAB, kind, meta) as writer:
        for tokens, mask in rows:
            writer.add(tokens, None if kind == "documents" else mask)
    return directory


def write_labelled(directory: Path, rows: list[Row], good: list[int]) -> Path:
    """Labelled answers: rows in twos, an answer and what it is compared with."""
    with atomic_directory(directory) as path, StoreWriter(path, SHA, VOCAB, "answers") as writer:
        for tokens, mask in rows:
            writer.add(tokens, mask)
        (path / LABELS).write_bytes(bytes(good))
        writer.close(extra=[LABELS])
    return directory


def refused(directory: Path, objective: str, rows: list[Row], meta: dict[str, Any] | None = None, **changes: Any) -> str:
    """What training on these rows is refused with."""
    good = changes.pop("good", None)
    job = small_job(directory, objective, number=4, **changes)
    kind = OBJECTIVES[objective].store
    store = write(directory / "made", kind, rows, meta) if good is None else write_labelled(directory / "made", rows, good)
    with pytest.raises(UserError) as error:
        train_stage(dataclasses.replace(job, train_store=store))
    assert not (job.run_dir / "metrics.jsonl").exists()
    line = str(error.value)
    assert "\n" not in line
    assert str(store) in line
    return line


@pytest.mark.parametrize(
    ("rows", "check", "share"),
    [
        ([EMPTY] * 4, "empty_mask", "100.00%"),
        ([GOOD, FIRST_ONLY], "empty_mask", "50.00%"),
        ([GOOD, GOOD, GOOD, OPEN], "open_answer", "25.00%"),
        ([TWO_TURNS], "open_answer", "100.00%"),
        ([GOOD, CUT], "cut_answer", "50.00%"),
    ],
)
def test_conversations_that_would_teach_the_wrong_thing_are_refused(
    tmp_path: Path, rows: list[Row], check: str, share: str
) -> None:
    line = refused(tmp_path, "sft", rows)
    assert f"{share} {CHECKS[check].what}" in line
    assert CHECKS[check].remedy in line
    assert f"checks.{CHECKS[check].key}" in line


FOREIGN: Row = ([9, 6, 8, END], [0, 0, 1, 1])
"""To another prompt."""


@pytest.mark.parametrize(
    ("rows", "good", "check"),
    [
        ([EMPTY, OTHER, GOOD, OTHER], [1, 0], "empty_mask"),
        ([GOOD, GOOD, OTHER, GOOD], [1, 0], "own_answer"),
        ([GOOD, FOREIGN, OTHER, GOOD], [1, 0], "own_answer"),
        ([GOOD, EMPTY, OTHER, GOOD], [1, 0], "own_answer"),
        ([GOOD, OTHER, GOOD, OTHER], [1, 0], "other_label"),
        ([GOOD, OTHER, OPEN, GOOD], [1, 0], "open_answer"),
        ([GOOD, OTHER, CUT, GOOD], [1, 0], "cut_answer"),
    ],
)
def test_labelled_answers_that_would_teach_the_wrong_thing_are_refused(
    tmp_path: Path, rows: list[Row], good: list[int], check: str
) -> None:
    line = refused(tmp_path, "kto", rows, good=good)
    assert f"50.00% {CHECKS[check].what} (1 of 2, first record" in line
    assert f"checks.{CHECKS[check].key}" in line


@pytest.mark.parametrize("good", [[1, 1], [0, 0]])
def test_answers_of_one_label_are_refused_and_may_be_allowed(tmp_path: Path, good: list[int]) -> None:
    assert "100.00% of the labelled answers have the same label" in refused(tmp_path, "kto", [GOOD, OTHER, OTHER, GOOD], good=good)
    allowed = small_job(tmp_path, "kto", run="allowed", train={"steps": 3}, checks={"one_label": 1.0})
    assert train_stage(dataclasses.replace(allowed, train_store=tmp_path / "made")).steps == 3


def test_what_is_held_out_may_have_one_label(tmp_path: Path) -> None:
    job = small_job(tmp_path, "kto", train={"steps": 3}, heldout=True)
    held = write_labelled(tmp_path / "held", [GOOD, OTHER, OTHER, GOOD], [1, 1])
    found = train_stage(dataclasses.replace(job, heldout_store=held)).heldout
    assert found["desirable"] == 1.0
    assert not {"reward_undesirable", "reward_margin"} & found.keys()


@pytest.mark.parametrize(
    ("good", "weights", "said"),
    [
        (
            3,
            {},
            "3 good and 9 bad answers, together weighed 0.33 to 1; 1 to 1.33 is recommended: kto.desirable_weight 3 to 4, or ",
        ),
        (
            9,
            {},
            "9 good and 3 bad answers, together weighed 3.00 to 1; 1 to 1.33 is recommended: kto.desirable_weight 0.333 to ",
        ),
        (3, {"desirable_weight": 3.5}, "3 good and 9 bad answers, together weighed 1.17 to 1"),
        (3, {"undesirable_weight": 0.25}, "3 good and 9 bad answers, together weighed 1.33 to 1"),
        (6, {}, "6 good and 6 bad answers, together weighed 1.00 to 1"),
        (6, {"desirable_weight": 0.9}, "together weighed 0.90 to 1; 1 to 1.33 is recommended"),
    ],
)
def test_the_weights_of_labels_are_measured_against_their_numbers(
    tmp_path: Path, good: int, weights: dict[str, float], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    job = small_job(tmp_path, "kto", kto=weights)
    store = write_store(tmp_path / "made", "kto", 12, good=[1] * good + [0] * (12 - good))
    open_run(dataclasses.replace(job, train_store=store))
    line = next(line for line in capfd.readouterr().out.splitlines() if "weighed" in line)
    assert said in line
    assert ("recommended" in line) == ("recommended" in said)
    kept = ChecksFile.read(job.run_dir / CHECKS_FILE).labels
    assert kept is not None
    assert (kept["desirable"], kept["undesirable"]) == (good, 12 - good)


@pytest.mark.parametrize(
    ("rows", "check"),
    [
        ([GOOD, OTHER, GOOD, EMPTY], "empty_side"),
        ([GOOD, GOOD, OTHER, GOOD], "identical_sides"),
        ([GOOD, OTHER, OTHER, GOOD], "swapped_pair"),
        ([GOOD, OTHER, GOOD, OPEN], "open_answer"),
        ([GOOD, OTHER, CUT, GOOD], "cut_answer"),
    ],
)
def test_pairs_that_would_teach_the_wrong_thing_are_refused(tmp_path: Path, rows: list[Row], check: str) -> None:
    line = refused(tmp_path, "dpo", rows)
    assert f"50.00% {CHECKS[check].what} (1 of 2, first record" in line
    assert f"checks.{CHECKS[check].key}" in line


def test_rows_of_documents_in_which_nothing_is_trained_are_refused(tmp_path: Path) -> None:
    assert "100.00% of the rows hold nothing that is trained" in refused(tmp_path, "next_token", [([5], [])] * 40)


def test_a_single_token_left_at_the_end_of_the_text_is_no_damage(tmp_path: Path) -> None:
    """Rows are cut one after the other from running text; a short held-out set would be refused for its last one."""
    store = write(tmp_path / "made", "documents", [([5] * (8 * LENGTH + 1), [])])
    stream = Stream(TokenStore.open(store), "next_token", LENGTH, batch_rows=1)
    assert len(stream.instances) == 9
    check_store(stream, ChecksSpec(), END, "held-out")


def test_a_last_row_of_several_tokens_in_which_nothing_is_trained_is_refused(tmp_path: Path) -> None:
    assert "first row 8" in refused(tmp_path, "next_token", [([5] * (8 * LENGTH), []), ([5], []), ([5], [])])


def test_a_length_that_loses_many_answers_is_refused(tmp_path: Path) -> None:
    """The store says so itself: of 8 rows 2 did not fit, and one was cut."""
    counts = {"source": "a", "split": "train", "kept": 6, "drops": {"too_long": 2, "duplicate": 5}, "shortened": 1}
    line = refused(tmp_path, "sft", [GOOD, OTHER], {"sources": [counts]})
    assert "37.50% of the records were cut or left out" in line
    assert "(3 of 8)" in line
    assert "raise data.sequence_length" in line


def test_what_is_allowed_trains_and_is_counted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job = small_job(tmp_path, "sft", number=4, train={"steps": 1, "warmup_steps": 0}, checks={"empty": 0.5, "open_answers": 0.5})
    store = write(tmp_path / "made", "conversations", [GOOD, EMPTY, OPEN, LINE_END])
    train_stage(dataclasses.replace(job, train_store=store))
    found = ChecksFile.read(job.run_dir / CHECKS_FILE)
    counts = {each["check"]: (each["count"], each["looked_at"]) for each in found.findings}
    assert counts == {"empty_mask": (1, 4), "open_answer": (1, 4), "cut_answer": (0, 4)}
    assert "small: training data: 25.00% of the records have nothing that is trained (1 of 4)" in capfd.readouterr().out
    assert found.isolation is not None
    assert found.isolation < 1e-3


def test_held_out_data_is_checked_too(tmp_path: Path) -> None:
    job = small_job(tmp_path, "sft", number=4, heldout=True)
    bad = write(tmp_path / "bad", "conversations", [EMPTY])
    with pytest.raises(UserError, match=r"bad: 100.00% of the records have nothing"):
        train_stage(dataclasses.replace(job, heldout_store=bad))


def test_what_was_checked_is_not_checked_again_unless_something_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = small_job(tmp_path, "sft", number=4, train={"steps": 1, "warmup_steps": 0})
    looks: list[str] = []

    def look(stream: Stream, allowed: ChecksSpec, end_id: int, name: str) -> list[Any]:
        looks.append(name)
        return check_store(stream, allowed, end_id, name)

    monkeypatch.setattr("keural.train.checks.record.check_store", look)
    train_stage(job)
    first = (job.run_dir / CHECKS_FILE).read_bytes()
    open_run(job)
    assert looks == ["training"]
    assert (job.run_dir / CHECKS_FILE).read_bytes() == first
    other = small_job(tmp_path, "sft", number=4, train={"steps": 1, "warmup_steps": 0}, checks={"empty": 0.5})
    open_run(other)
    assert looks == ["training"] * 2


def test_a_damaged_record_of_checks_is_refused(tmp_path: Path) -> None:
    job = small_job(tmp_path, "sft", number=4)
    open_run(job)
    path = job.run_dir / CHECKS_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"isolation": 0.5}))
    with pytest.raises(UserError, match=r"checks.json: damaged .*delete it and run the same command again"):
        open_run(job)


def test_a_large_store_is_looked_at_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keural.train.checks.stores.LOOKED_AT", 10)
    store = write(tmp_path / "made", "conversations", [GOOD] * 900 + [EMPTY] * 100)
    stream = Stream(TokenStore.open(store), "sft", LENGTH, batch_rows=1)
    with pytest.raises(UserError, match=r"10.00% .*\(1 of 10, first record 999\)"):
        check_store(stream, ChecksSpec(), END, "training")


def test_a_balance_loss_over_experts_that_are_all_used_is_refused(tmp_path: Path) -> None:
    job = small_job(tmp_path, number=4)
    config = small_config(num_local_experts=2)
    with pytest.raises(UserError, match=r"balance_coef 0.02 has no effect: every token uses all 2 experts.*set it to 0"):
        train_stage(dataclasses.replace(job, model_config=config))
    train_stage(dataclasses.replace(small_job(tmp_path, number=4, router={"balance_coef": 0.0}), model_config=config))


class LeakingPolicy(Policy):
    """An attention that does not know of packed documents: positions run on over the row."""

    def forward(self, micro: MicroBatch, with_labels: bool = True) -> PolicyOutput:
        positions = torch.arange(micro.input_ids.shape[1]).expand_as(micro.position_ids)
        return super().forward(dataclasses.replace(micro, position_ids=positions), with_labels)


@pytest.mark.parametrize("objective", ["next_token", "sft", "dpo", "kto"])
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_every_way_of_computing_keeps_packed_documents_apart(tmp_path: Path, objective: str, recompute: str) -> None:
    """`selective` is computed by the training engine."""
    trainer = open_run(small_job(tmp_path, objective, train={"recompute": recompute})).trainer
    assert (trainer.policy.engine is not None) == (recompute == "selective")
    found = check_isolation(trainer)
    assert found is not None
    assert found < 1e-3


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("attention", ["documents", "flex", "masked"])
def test_every_attention_of_the_engine_keeps_packed_documents_apart(tmp_path: Path, attention: str) -> None:
    """Those that a CPU can run; a card's are probed when a stage begins there."""
    trainer = open_run(small_job(tmp_path, "sft", train={"recompute": "selective"})).trainer
    assert isinstance(trainer.policy.engine, Engine)
    engine = dataclasses.replace(trainer.policy.engine, attention=attention)
    policy = Policy(trainer.policy.model, torch.float32, engine)
    found = check_isolation(dataclasses.replace(trainer, policy=policy))
    assert found is not None
    assert found < 1e-3


@pytest.mark.parametrize("objective", ["next_token", "sft", "dpo", "kto"])
def test_an_attention_that_sees_the_neighbour_is_refused(tmp_path: Path, objective: str) -> None:
    trainer = open_run(small_job(tmp_path, objective)).trainer
    leaking = LeakingPolicy(trainer.policy.model, torch.float32)
    with pytest.raises(UserError, match="packed documents are not kept apart"):
        check_isolation(dataclasses.replace(trainer, policy=leaking))


def test_rows_of_one_document_have_nothing_to_keep_apart(tmp_path: Path) -> None:
    job = small_job(tmp_path, "sft", number=4)
    store = write(tmp_path / "made", "conversations", [([5] * (LENGTH - 1) + [END], [0] * (LENGTH - 2) + [1, 1])] * 3)
    assert check_isolation(open_run(dataclasses.replace(job, train_store=store)).trainer) is None


def test_checks_change_nothing(tmp_path: Path) -> None:
    """Neither weights nor gradients, and the reference is the policy to the last bit."""
    trainer = open_run(small_job(tmp_path, "dpo")).trainer
    before = {name: value.clone() for name, value in trainer.policy.state_dict().items()}
    check_isolation(trainer)
    assert check_references(trainer) == 0.0
    assert all(torch.equal(before[name], value) for name, value in trainer.policy.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.policy.parameters())


def test_a_reference_of_another_model_is_refused(tmp_path: Path) -> None:
    """Values that pass every checksum: the cache was filled by a model with slightly other weights."""
    trainer = open_run(small_job(tmp_path, "dpo")).trainer
    with torch.no_grad():
        for parameter in trainer.policy.parameters():
            parameter.mul_(1.01)
    with pytest.raises(UserError, match=r"reference log-probabilities are those of another model.*per token"):
        check_references(trainer)


def test_references_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    trainer = open_run(small_job(tmp_path, "dpo")).trainer
    nothing = dataclasses.replace(trainer, references=lambda sequences: torch.full(sequences.shape, float("nan")))
    with pytest.raises(UserError, match="another model"):
        check_references(nothing)


def test_a_resumed_stage_is_not_probed_again(tmp_path: Path) -> None:
    """Its model is no longer the reference."""
    job = small_job(tmp_path, "dpo", train={"steps": 4, "save_every": 2, "lr": 0.05})
    train_stage(job)
    open_run(job)
    assert len(metrics_of(job)) == 4


@pytest.mark.parametrize("name", list(ChecksSpec.model_fields))
def test_every_threshold_belongs_to_a_check(name: str) -> None:
    assert name in {check.key for check in CHECKS.values()}
    assert {check.key for check in CHECKS.values()} == set(ChecksSpec.model_fields)


def test_answers_of_one_token_and_at_the_very_beginning_are_read_like_others(tmp_path: Path) -> None:
    rows: list[Row] = [([END, 5, END], [1, 0, 1]), ([END], [1]), ([5, END], [0, 1])]
    stream = Stream(TokenStore.open(write(tmp_path / "made", "conversations", rows)), "sft", LENGTH, batch_rows=1)
    found = {each.check: each.count for each in check_store(stream, ChecksSpec(empty=1.0), END, "training")}
    assert found == {"empty_mask": 1, "open_answer": 0, "cut_answer": 0}


def test_length_bias_is_counted_by_source(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of source a the longer answer is always chosen, of b once the shorter one and once neither."""
    short, long, same = ([5, 6, END], [0, 1, 1]), ([5, 7, 8, 9, END], [0, 1, 1, 1, 1]), ([5, 8, END], [0, 1, 1])
    sections = [{"source": "a", "sequences": 4}, {"source": "b", "sequences": 4}]
    rows: list[Row] = [long, short, long, same, short, ([5, 7, 9, 9, END], [0, 1, 1, 1, 1]), same, ([5, 9, END], [0, 1, 1])]
    store = write(tmp_path / "made", "pairs", rows, {"sections": sections})
    job = small_job(tmp_path, "dpo", number=4, train={"steps": 1, "warmup_steps": 0})
    train_stage(dataclasses.replace(job, train_store=store))
    found = {each["source"]: each for each in ChecksFile.read(job.run_dir / CHECKS_FILE).lengths}
    shares = {name: (each["pairs"], each["longer"]) for name, each in found.items()}
    assert shares == {"": (4, 0.625), "a": (2, 1.0), "b": (2, 0.25)}
    assert (found["a"]["chosen_tokens"], found["a"]["rejected_tokens"]) == (4.0, 2.0)
    said = "training data: by length alone (the longer answer) 62.5% of the pairs are ranked right; chosen answers have 3 tokens"
    assert said in capfd.readouterr().out


def test_reference_values_are_not_computed_of_pairs_that_cannot_be_trained(tmp_path: Path) -> None:
    job = small_job(tmp_path, "dpo", number=4)
    bad = write(tmp_path / "bad", "pairs", [GOOD, GOOD])
    with pytest.raises(UserError, match="two answers that are the same"):
        make_references(dataclasses.replace(job, train_store=bad))
    assert not list(job.run_dir.iterdir())


def test_other_data_has_no_length_bias(tmp_path: Path) -> None:
    job = small_job(tmp_path, "sft", number=4, train={"steps": 1, "warmup_steps": 0})
    train_stage(job)
    assert ChecksFile.read(job.run_dir / CHECKS_FILE).lengths == []
