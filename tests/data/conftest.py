"""A small tokenizer, and sources written as files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keural.data.records import Document
from keural.data.sources import open_source
from keural.recipe import SourceSpec, TokenizerSpec
from keural.tokenizer import KeuralTokenizer
from keural.tokenizer.train import train_tokenizer

Write = Callable[..., SourceSpec]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> KeuralTokenizer:
    prose = SourceSpec(name="prose", adapter="microworld", options={"part": "prose", "count": 800})
    texts = (record.text for record in open_source(prose, None).read(seed=1) if isinstance(record, Document))
    spec = TokenizerSpec(vocab_size=700, sources=[prose])
    return train_tokenizer(texts, spec, tmp_path_factory.mktemp("tokenizer") / "small", seed=1)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write `content` to a file below the data directory, and give the source that reads it."""

    def written(file: str, content: str | bytes, adapter: str = "text", **settings: Any) -> SourceSpec:
        path = tmp_path / "data" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        return SourceSpec(**({"name": "source", "adapter": adapter, "path": file} | settings))

    return written


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.mkdir(exist_ok=True)
    return path
