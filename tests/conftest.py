"""Fixtures that several rooms' tests share.

What takes seconds to import is imported by who asks for it: the process that shares tests out to others asks for nothing.
"""

from __future__ import annotations

import gc
import os
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from keural.releases import installed_releases
from tests.helpers.examples import MANY, QUICK, RANDOM
from tests.helpers.shapes import SMALL

if TYPE_CHECKING:
    from keural.model import KeuralConfig, KeuralMoECausalLM
    from keural.tokenizer import KeuralTokenizer

ROOT = Path(__file__).resolve().parents[1]
WORDS = """the cat sees a small red house and two blue birds in the garden on Monday morning with eleven
고양이는 작은 빨간 집과 파란 새 두 마리를 정원에서 봅니다 안녕하세요 감사합니다 월요일 아침 열하나"""
TEXTS = [" ".join(WORDS.split()[(start * step) % 34] for step in range(1, 14)) for start in range(1, 200)]

Keural = Callable[..., tuple[int, str, str]]


def pytest_report_header() -> str:
    """So that a failure is seen beside the releases it came with."""
    return f"releases: {installed_releases()}"


# The quick suite tries the same examples each time; `--hypothesis-profile=random`, which the slow suite has, tries others, and more
# of them (tests/helpers/examples.py). How long an example takes is no matter: the machine may be busy.
UNHURRIED: dict[str, Any] = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("repeatable", derandomize=True, max_examples=QUICK, **UNHURRIED)
hypothesis.settings.register_profile(RANDOM, derandomize=False, max_examples=QUICK * MANY, **UNHURRIED)
hypothesis.settings.load_profile("repeatable")

# Nothing that is collected goes before the tests end: looking through it for what could took a third of the collection's time. What
# the tests leave is looked through when there is more of it than Python waits for, which took a tenth of theirs.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(10_000, 5, 5)
    gc.enable()


if "PYTEST_XDIST_WORKER" in os.environ:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _disks_are_not_waited_for() -> Iterator[None]:
    """A flush takes ten milliseconds and more, and no test can tell whether it was done; that one is asked for, a test can see.

    A descriptor that is none fails as it does.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


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


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> KeuralTokenizer:
    """A lossless tokenizer of 402 ids."""
    from keural.recipe import TokenizerSpec
    from keural.tokenizer.train import train_tokenizer

    source = {"name": "words", "adapter": "text"}
    spec = TokenizerSpec.model_validate({"vocab_size": 400, "sources": [source]})
    return train_tokenizer(iter(TEXTS), spec, tmp_path_factory.mktemp("tokenizer") / "tokenizer", seed=0)


@pytest.fixture(scope="session")
def make_config(tokenizer: KeuralTokenizer) -> Callable[..., KeuralConfig]:
    """Makes a configuration of two layers and four experts with the tokenizer's ids; keywords change it."""
    from keural.model import KeuralConfig

    def make(**changes: object) -> KeuralConfig:
        ids = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.im_end_id}
        lengths = {"sliding_window": 9, "max_position_embeddings": 160}
        return KeuralConfig(**(SMALL | ids | lengths | {"initializer_range": 0.3} | changes))

    return make


@pytest.fixture(scope="session")
def model(make_config: Callable[..., KeuralConfig]) -> KeuralMoECausalLM:
    """A random model; its weights are large enough for peaked, varied predictions."""
    import torch

    from keural.model import KeuralMoECausalLM

    torch.manual_seed(0)
    return KeuralMoECausalLM(make_config()).eval()


@pytest.fixture(scope="session")
def model_dir(model: KeuralMoECausalLM, tokenizer: KeuralTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's directory, its weights in several shards. Do not change it; copy it."""
    from keural.pretrained.directory import save_model_directory
    from keural.recipe import ChatSpec

    out = tmp_path_factory.mktemp("run") / "model"
    lineage = {"recipe": "tiny", "stage": "dpo-2", "chain": ["pretrain-1", "sft-1", "dpo-2"]}
    return save_model_directory(out, model.config, model.state_dict(), tokenizer, lineage, ChatSpec(system="Be brief."), 30_000)


@pytest.fixture
def keural(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Keural:
    """Run the command in this process; gives exit code, standard output, standard error."""
    from keural.cli.app import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["keural", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run
