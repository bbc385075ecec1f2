"""Fixtures that several rooms' tests share."""

import os
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = ROOT

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory with the reference tokenizer and the real data: $KEURAL_SHARED, or ../shared beside the repository."""
    path = Path(os.environ.get("KEURAL_SHARED", ROOT.parent / "shared"))
    if not (path / "reference" / "tokenizer").is_dir():
        pytest.skip(f"no shared reference directory at {path} (set KEURAL_SHARED)")
    return path


@pytest.fixture(scope="session")
def real_data(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unpacked copy of the real Korean and English sets."""
    archives = sorted((shared / "data").glob("*.tar.gz"))
    if not archives:
        pytest.skip(f"no data archives in {shared / 'data'}")
    target = tmp_path_factory.mktemp("real_data")
    for archive in archives:
        with tarfile.open(archive) as tar:
            tar.extractall(target, filter="data")
    return target


@pytest.fixture(scope="session")
def published_tokenizer_file(shared: Path) -> Path:
    """The published SentencePiece model file."""
    return shared / "reference" / "tokenizer" / "keural_tokenizer.model"
