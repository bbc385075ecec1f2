"""In which order the stages of a run read their data."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from keural.files import read_json
from keural.pipeline.run_directory import StageMarker
from keural.pipeline.workspace import Workspace, open_stream, prepare_all
from keural.recipe import load_recipe
from keural.recipe.shipped import SHIPPED


@pytest.fixture
def reads_on(place: Any) -> Workspace:
    """The tiny recipe with two stages more, which read what `steady` reads; the second one has another row length."""
    recipe = place.root / "recipe"
    spec = yaml.safe_load((recipe / "recipe.yaml").read_text())
    (recipe / "recipe.yaml").write_text(yaml.safe_dump(spec | {"stages": ["steady", "on", "short"]}, allow_unicode=True))
    steady = yaml.safe_load((recipe / "steady.yaml").read_text())
    (recipe / "on.yaml").write_text(yaml.safe_dump(steady | {"name": "on", "init_from": "steady"}))
    shorter = steady["data"] | {"sequence_length": 16}
    (recipe / "short.yaml").write_text(yaml.safe_dump(steady | {"name": "short", "init_from": "on", "data": shorter}))
    loaded = load_recipe(recipe)
    return prepare_all(loaded, loaded.stages, place.run)


def test_a_stage_does_not_begin_again_with_what_the_one_before_it_has_read(reads_on: Workspace) -> None:
    steady, on, _ = (open_stream(reads_on, stage).batch(0).input_ids for stage in reads_on.recipe.stages)
    assert steady.shape == on.shape
    assert steady.tolist() != on.tolist()


def test_what_is_trained_is_what_is_shown(reads_on: Workspace, place: Any) -> None:
    """Both stages are known by the seed of their order."""
    place.again("--until", "on")
    seeds = [read_json(place.run / name / "stage.json")["settings"]["seed"] for name in ("steady", "on")]
    assert seeds == [open_stream(reads_on, stage).seed for stage in reads_on.recipe.stages[:2]]


def test_a_stage_that_an_earlier_version_read_in_the_order_before_says_that_and_no_other_seed(
    reads_on: Workspace, place: Any
) -> None:
    place.again("--until", "on")
    marker = StageMarker.read(place.run / "on" / "stage.json")
    StageMarker.of(marker.settings | {"seed": 42}).write(place.run / "on" / "stage.json")
    (place.run / "on" / "done.json").unlink()
    said = place.again("--until", "on")
    assert "other settings (the order of its data, another one now where a stage before it reads some of the same)" in said
    assert "what was made is kept as" in said
    assert "seed:" not in said


def test_settings_that_change_no_data_change_no_order(reads_on: Workspace, place: Any) -> None:
    path = place.root / "recipe" / "on.yaml"
    spec = yaml.safe_load(path.read_text())
    spec["data"]["sources"][0]["max_drop"] = 0.9
    path.write_text(yaml.safe_dump(spec))
    checked = load_recipe(place.root / "recipe")
    workspace = Workspace(checked, place.run, reads_on.tokenizer, reads_on.data)
    assert checked.stages[1].data != reads_on.recipe.stages[1].data
    assert workspace.seed(checked.stages[1]) == reads_on.seed(reads_on.recipe.stages[1])


def test_only_what_goes_on_from_the_same_data_has_another_seed(reads_on: Workspace, tmp_path: Path) -> None:
    assert [reads_on.seed(stage) == 42 for stage in reads_on.recipe.stages] == [True, False, True]
    recipe = load_recipe(SHIPPED / "laptop", [f"data={tmp_path}"])
    workspace = Workspace(recipe, tmp_path, reads_on.tokenizer, {})
    others = [stage.name for stage in recipe.stages if workspace.seed(stage) != recipe.spec.seed]
    assert others == ["pretrain-2", "sft-2", "sft-3"]  # which has one source more; dpo-2 does not go on from dpo-1


@pytest.mark.parametrize(
    ("name", "others"),
    [("toy", []), ("keural-14b", ["pretrain-2"]), ("keural-14b-2xh200", ["pretrain-2"]), ("keural-14b-published", ["pretrain-2"])],
)
def test_recipes_have_another_order_where_a_stage_reads_some_of_what_one_before_it_reads(
    reads_on: Workspace, tmp_path: Path, name: str, others: list[str]
) -> None:
    """The 14B's second stage has three sources of the first one, with other weights."""
    recipe = load_recipe(SHIPPED / name)
    workspace = Workspace(recipe, tmp_path, reads_on.tokenizer, {})
    assert [stage.name for stage in recipe.stages if workspace.seed(stage) != recipe.spec.seed] == others
