"""The laptop recipe and those that extend it: what is measured is not trained on, and the rate of SFT falls to 0."""

from pathlib import Path

import pytest

from keural.recipe import Recipe, SourceSpec, load_recipe
from keural.recipe.shipped import SHIPPED

OWN = {"passage": {"prompt", "characters", "read_as"}, "qa": {"question", "answer", "template", "text"}}
"""Options of an SFT source that do not say how the text of a row is read."""


def recipe(name: str, data: Path) -> Recipe:
    return load_recipe(SHIPPED / name, [f"data={data}"])


def rereads(source: SourceSpec, pretrained: list[SourceSpec]) -> SourceSpec | None:
    """The source of pretraining whose files a source of SFT reads, too; a file below a directory counts."""
    return next((each for each in pretrained if source.path == each.path or Path(each.path) in Path(source.path).parents), None)


@pytest.mark.parametrize("name", ["laptop", "evening", "one-gpu"])
def test_sft_holds_out_the_texts_that_pretraining_holds_out(name: str, tmp_path: Path) -> None:
    found = recipe(name, tmp_path)
    before = found.stage("pretrain-2").data
    for stage in (stage for stage in found.stages if stage.objective == "sft"):
        assert stage.data.heldout_per_mille >= before.heldout_per_mille
        again = [(source, read) for source in stage.data.sources if (read := rereads(source, before.sources))]
        assert {source.adapter for source, _ in again} == {"passage", "qa"}
        for source, read in again:
            reading = {key: value for key, value in source.options.items() if key not in OWN[source.adapter]}
            if source.adapter == "qa":
                reading["field"] = source.options["text"]
            assert reading == read.options, source.name
            assert source.options.get("read_as", read.adapter) == read.adapter, source.name
            assert source.format == read.format, source.name


@pytest.mark.parametrize("name", ["laptop", "evening", "one-gpu"])
def test_the_rate_of_sft_falls_to_nothing(name: str, tmp_path: Path) -> None:
    stages = [stage.train for stage in recipe(name, tmp_path).stages if stage.objective == "sft"]
    assert [each.optimizer for each in stages] == ["adamw"] * 3
    assert all(each.min_lr < each.lr for each in stages)
    assert stages[0].min_lr == stages[1].lr
    assert stages[2].min_lr == 0
