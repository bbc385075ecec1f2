"""Records of an evaluation: written as JSON and read back unchanged, and nothing else is read."""

import json
from dataclasses import replace

import pytest
from pydantic import ValidationError

from keural.evaluate.results.records import ItemResult

ITEM = ItemResult("0a1b", "physics", 1.0, "왜?", "B", "B", (-1.25, -0.5), 12, {"per_token": 0.0, "cut": 3})


@pytest.mark.parametrize("item", [ITEM, replace(ITEM, cluster=None, logprobs=None, details={})])
def test_what_is_written_is_read_back(item: ItemResult) -> None:
    assert ItemResult.from_json(json.loads(json.dumps(item.to_json()))) == item


@pytest.mark.parametrize(
    "change",
    [{"score": "1"}, {"score": float("nan")}, {"tokens": 1.5}, {"logprobs": [None]}, {"more": 1}, {"id": 7}],
)
def test_other_values_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ItemResult.from_json(ITEM.to_json() | change)
