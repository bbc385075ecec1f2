"""What of a recipe determines a result is said at each key, and fingerprints follow from it."""

from typing import Any

import pytest
from pydantic import BaseModel, Field

from keural.files import fingerprint
from keural.recipe import (
    ChatSpec,
    CleaningSpec,
    DataSpec,
    Part,
    RecipeSpec,
    SourceSpec,
    Spec,
    StageSpec,
    TrainSpec,
    mark_of,
    neutral,
    not_for,
)

PROSE = {"name": "prose", "adapter": "text", "path": "prose.jsonl"}


def stage(**changes: Any) -> StageSpec:
    data = {"sources": [PROSE], "sequence_length": 32} | changes.pop("data", {})
    train = {"steps": 10, "lr": 1e-3, "batch_tokens": 64} | changes.pop("train", {})
    return StageSpec.model_validate({"name": "base", "objective": "next_token", "data": data, "train": train} | changes)


def weights(spec: StageSpec) -> str:
    return fingerprint(spec.determining("weights"))


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"save_every": 3, "keep_checkpoints": 2, "evaluate_every": 5}},
        {"train": {"micro_batch_tokens": 32, "recompute": "full", "compile": True}},
        {"data": {"sources": [PROSE | {"expect": 17, "max_drop": 0.1}]}},
        {"data": {"cleaning": {"executor": {"workers": 3}, "examples": 9}}},
        {"notes": ["from a paper"]},
        {"init_from": "models/base"},  # what is there counts, not its name
    ],
)
def test_marked_keys_do_not_change_what_determines_the_weights(changes: dict[str, Any]) -> None:
    plain = {"data": {"cleaning": {}}} if "cleaning" in changes.get("data", {}) else {}
    assert weights(stage(**changes)) == weights(stage(**plain))


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"lr": 1e-4}},
        {"train": {"steps": 11}},
        {"train": {"compute_dtype": "bfloat16"}},
        {"data": {"sources": [PROSE | {"limit": 17}]}},
        {"data": {"cleaning": {}}},
        {"data": {"cleaning": {"filters": False}}},
        {"router": {"z_coef": 0.0}},
    ],
)
def test_every_other_key_does(changes: dict[str, Any]) -> None:
    assert weights(stage(**changes)) != weights(stage())


def test_where_losses_are_balanced_within_a_forward_pass_its_size_counts() -> None:
    router = {"router": {"scope": "micro_batch"}}
    assert weights(stage(**router)) != weights(stage(**router, train={"micro_batch_tokens": 32}))


def test_a_key_may_matter_for_one_part_and_not_for_another() -> None:
    def marked(part: Part, **keys: Any) -> bool:
        return SourceSpec(**PROSE).determining(part) == SourceSpec(**PROSE, **keys).determining(part)

    assert marked("data", weight=2.0)
    assert not marked("weights", weight=2.0)
    assert marked("cleaning", limit=5)
    assert not marked("data", limit=5)
    assert DataSpec(sources=[SourceSpec(**PROSE)], sequence_length=8).determining("data") == {"sources": [PROSE]}
    assert ChatSpec(temperature=0.1).determining("evaluation") == {}
    assert CleaningSpec(tasks=3).determining("cleaning") == {"tasks": 3}


class Later(TrainSpec):
    """`TrainSpec` of a later version, which has one key more."""

    half_life: float = Field(0.0, ge=0)


def test_a_key_that_is_added_later_changes_nothing_while_it_has_its_default() -> None:
    given = {"steps": 10, "lr": 1e-3, "batch_tokens": 64}
    now, later = TrainSpec(**given), Later(**given)
    assert fingerprint(now.determining("weights")) == fingerprint(later.determining("weights"))
    assert fingerprint(now.determining("weights")) != fingerprint(Later(**given, half_life=3.0).determining("weights"))


def test_a_default_that_is_written_out_is_the_default() -> None:
    assert weights(stage(train={"weight_decay": 0.1}, router={"balance_coef": 0.02})) == weights(stage())


def test_a_spec_that_is_given_with_its_defaults_is_not_one_that_is_left_out() -> None:
    class Inner(Spec):
        a: int = 1

    class Outer(Spec):
        inner: Inner | None = None
        always: Inner = Field(default_factory=Inner)
        place: str = neutral("place", "x")
        other: int = not_for(("data",), 0)

    assert Outer().determining("data") == Outer(place="y", other=3).determining("data") == {}
    assert Outer(other=3).determining("weights") == {"other": 3}
    assert Outer(inner=Inner()).determining("data") == {"inner": {}}
    assert Outer(always=Inner(a=2)).determining("data") == {"always": {"a": 2}}


def test_every_mark_says_what_it_needs() -> None:
    def fields(kind: type[BaseModel]) -> Any:
        for name, field in kind.model_fields.items():
            yield f"{kind.__name__}.{name}", field
            for inner in [field.annotation, *getattr(field.annotation, "__args__", ())]:
                if isinstance(inner, type) and issubclass(inner, BaseModel):
                    yield from fields(inner)

    marks = {name: mark_of(field) for kind in (RecipeSpec, StageSpec) for name, field in fields(kind)}
    assert {name for name, mark in marks.items() if mark.get("length")} == {
        "TrainSpec.steps", "TrainSpec.epochs", "TrainSpec.budget_share", "TrainSpec.max_epochs", "TrainSpec.steps_to_skip"
    }  # fmt: skip
    assert all(mark["changes_result"] or mark["purpose"] for mark in marks.values())
    assert marks["TrainSpec.lr"] == {"changes_result": True}
    assert marks["SourceSpec.expect"] == {"changes_result": False, "purpose": "check"}
