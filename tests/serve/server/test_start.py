"""What a server refuses before it loads a model, and how it begins."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from keural.errors import UserError
from keural.serve.server import running
from keural.serve.server.settings import Settings
from keural.serve.server.start import run_serve


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "other machines can reach this address: give --api-key-file FILE"),
        (
            {"insecure": True, "allow_hosts": ["keural.example"]},
            "--allow-host: means nothing where other machines can reach the server",
        ),
    ],
)
def test_an_address_that_others_reach(model_dir: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_serve(model_dir, Settings(host="0.0.0.0", port=0, **settings))


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_eager_steps_of_an_engine_elsewhere(model_dir: Path, engine: str) -> None:
    with pytest.raises(UserError, match="--eager: means nothing for this engine; leave it out"):
        run_serve(model_dir, Settings(port=0, engine=engine, eager=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are graphs to do without")
def test_eager_steps_without_a_gpu(model_dir: Path) -> None:
    with pytest.raises(UserError, match="--eager: torch finds no GPU here"):
        run_serve(model_dir, Settings(port=0, eager=True))


def test_a_model_that_is_too_large_for_the_gpu(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(running, "build", build)
    with pytest.raises(UserError, match="the GPU's memory is not enough; free some, give fewer --slots, or take a larger GPU"):
        run_serve(model_dir, Settings(port=0))


def test_the_collector_passes_over_what_was_loaded(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[bool] = []

    def run(server: running.Server, **_: object) -> None:
        looked_at.append(any(thing is server for thing in gc.get_objects()))  # gives none that is frozen

    monkeypatch.setattr(running.Server, "run", run)
    monkeypatch.setattr(running, "set_up_logging", lambda: None)

    assert run_serve(model_dir, Settings(port=0)) == 0
    assert looked_at == [False]
