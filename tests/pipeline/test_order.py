"""In which order the stages of a run read their data."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from keural.files import read_json
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


def test_only_what_goes_on_from_the_same_data_has_another_seed(reads_on: Workspace, tmp_path: Path) -> None:
    assert [reads_on.seed(stage) == 42 for stage in reads_on.recipe.stages] == [True, False, True]
    recipe = load_recipe(SHIPPED / "laptop", [f"data={tmp_path}"])
    workspace = Workspace(recipe, tmp_path, reads_on.tokenizer, {})
    others = [stage.name for stage in recipe.stages if workspace.seed(stage) != recipe.spec.seed]
    assert others == ["pretrain-2", "sft-2"]  # dpo-2 does not go on from dpo-1
