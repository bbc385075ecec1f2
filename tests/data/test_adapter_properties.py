"""Whatever JSON a row of a set's shape holds: no adapter raises, every row is kept or counted with a reason, and what is kept
renders with something to train on.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keural.data.adapters import ADAPTERS, aihub
from keural.data.filtering.gates import Gatekeeper
from keural.data.records import Conversation, Document, Drop, PreferencePair
from keural.data.tokens.encode import Encoded, Encoder
from keural.recipe import DataSpec, SourceSpec
from keural.tokenizer import KeuralTokenizer
from keural.tokenizer.chatml import Message, render

ROWS = Path(__file__).with_name("rows")
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 10**20)
    | st.floats(allow_nan=True)
    | st.sampled_from(["", " ", "\ud800", "N/A", "<|im_end|>", "1", "질문자", "speaker1", "user", "Human:", "\n\nAssistant: a"])
    | st.text(max_size=6)
)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=6
)


def shaped(value: Any) -> st.SearchStrategy[Any]:
    """Values like this one: any part may be itself, anything at all, repeated, shuffled or missing."""
    if isinstance(value, dict):
        fields = {key: shaped(item) for key, item in value.items()}
        same = st.one_of(
            st.fixed_dictionaries(fields),
            st.fixed_dictionaries({}, optional=fields),
            st.fixed_dictionaries(fields, optional={"extra": ANYTHING}),
        )
    elif isinstance(value, list) and value:
        same = st.one_of(st.tuples(*map(shaped, value)).map(list), st.lists(st.one_of(*map(shaped, value)), max_size=6))
    else:
        return st.one_of(st.just(value), st.just(value), st.just(value), ANYTHING)
    return st.one_of(same, same, same, same, same, ANYTHING)


CASES = [
    (path.stem, case.get("options", {}), case["row"])
    for path in sorted(ROWS.glob("*.yaml"))
    for case in yaml.safe_load(path.read_text())
]
GENERIC: dict[str, list[Any]] = {
    "messages": [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "system": "s"}],
    "sharegpt": [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}],
    "alpaca": [{"instruction": "q", "input": "x", "output": "a"}],
    "qa": [{"question": "q", "answer": "a"}],
    "dialogue": [{"dialogue": [["q", "a"], ["r", "b"]]}],
    "preference": [
        {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": 1},
        {"question": "q", "chosen": ["a"], "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]},
    ],
    "text": [{"text": "a"}],
}
CASES += [(name, {}, row) for name, rows in GENERIC.items() for row in rows]
KINDS: dict[str, Any] = {}
for _name, _options, _row in CASES:
    KINDS.setdefault(str(ADAPTERS[_name].kind), []).append((_name, _options, _row))


@st.composite
def rows(draw: st.DrawFn, kind: str) -> tuple[SourceSpec, Any]:
    """A source of this kind, and a row in its shape."""
    name, options, row = draw(st.sampled_from(KINDS[kind]))
    choices = {"pairs": st.sampled_from(aihub.POLICIES)} if name == "aihub_71748" else {}
    drawn = draw(st.fixed_dictionaries({}, optional=choices))
    source = SourceSpec(name=name, adapter=name, options=options | drawn, language=draw(st.sampled_from([None, "ko", "en"])))
    return source, draw(shaped(row))


def check(source: SourceSpec, row: Any, tokenizer: KeuralTokenizer) -> list[Any]:
    """Assert it of one row; gives what became of it."""
    adapter = ADAPTERS[source.adapter]
    keeper = Gatekeeper(source, adapter.gates)
    encoder = Encoder(tokenizer, DataSpec(sources=[source], sequence_length=100_000))
    parts = [row] if adapter.split is None else adapter.split(row, source)
    records = [adapter(part, source, "file:1") for part in parts]
    for record in records:
        if isinstance(record, Drop):
            assert record.reason, "counted under something"
            continue
        assert all(keeper.reasons(record, "drop"))
        assert all(keeper.reasons(record, "count"))
        assert not isinstance(record, Document) or record.text.strip()
    results = list(encoder.encode(records))
    assert len(results) == len(records)
    for record, result in zip(records, results, strict=True):
        if isinstance(record, Drop):
            assert result == record
            continue
        assert isinstance(result, Encoded)
        for ids, mask in result.sequences:
            assert len(ids) > 0
            assert mask is None or (any(mask) and len(mask) == len(ids))
        if isinstance(record, Conversation):
            assert any(render(tokenizer, record.messages).mask)
        if isinstance(record, PreferencePair):
            assert any(render(tokenizer, [*record.prompt, Message("assistant", record.chosen)]).mask)
    return records


QUICK, SLOW = 60, 10_000
RELAXED = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_rows_of_any_content(kind: str, tokenizer: KeuralTokenizer) -> None:
    many(kind, tokenizer, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_ten_thousand_rows_of_any_content(kind: str, tokenizer: KeuralTokenizer) -> None:
    many(kind, tokenizer, SLOW)


def many(kind: str, tokenizer: KeuralTokenizer, examples: int) -> None:
    kept, dropped = 0, 0

    @settings(RELAXED, max_examples=examples)
    @given(case=rows(kind))
    def run(case: tuple[SourceSpec, Any]) -> None:
        nonlocal kept, dropped
        records = check(*case, tokenizer)
        drops = sum(isinstance(record, Drop) for record in records)
        kept, dropped = kept + len(records) - drops, dropped + drops

    run()
    assert kept > examples / 20, "the rows are near enough to good ones"
    assert dropped > examples / 20
