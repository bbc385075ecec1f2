"""The two families of recipes for the full model: they load, their adapters exist, and the published counts add up."""

from pathlib import Path

import pytest

from keural.data.adapters import ADAPTERS
from keural.data.licenses import left_out, license_of
from keural.recipe import OBJECTIVES, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("name", ["keural-14b-published", "keural-14b"])
def test_every_source_has_an_adapter_of_its_stages_kind(name: str) -> None:
    recipe = load_recipe(RECIPES / name)
    for stage in recipe.stages:
        for source in stage.data.sources:
            assert ADAPTERS[source.adapter].kind_of(source) == OBJECTIVES[stage.objective].store, source.name
            assert set(source.options) <= set(ADAPTERS[source.adapter].options), source.name


@pytest.mark.parametrize(("stage", "count", "sources"), [("sft-3", 2_351_212, 12), ("dpo-1", 440_627, 1), ("dpo-2", 485_793, 8)])
def test_published_counts_add_up(stage: str, count: int, sources: int) -> None:
    listed = load_recipe(RECIPES / "keural-14b-published").stage(stage).data.sources
    assert (sum(source.expect or 0 for source in listed), len(listed)) == (count, sources)


def test_ours_has_no_benchmark_and_a_licence_for_each_source() -> None:
    for stage in load_recipe(RECIPES / "keural-14b").stages:
        assert not stage.data.benchmarks
        assert all(license_of(source) for source in stage.data.sources)
        assert [source.name for source in stage.data.sources if left_out(stage.data, source)] == []


def test_ours_tells_translations_from_their_originals() -> None:
    sources = load_recipe(RECIPES / "keural-14b").stage("dpo").data.sources
    spaces = [source.id_space for source in sources if source.id_space]
    assert sorted(spaces) == ["orca_dpo_pairs", "orca_dpo_pairs", "ultrafeedback", "ultrafeedback"]
