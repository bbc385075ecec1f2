"""The comparison of packed and padded pairs runs whole with a tiny model, and both sides compute the same step."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from keural.data.loading.row_layout import RowShape
from keural.train.gradients import accumulate_gradients, forward_backward

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "pair_packing.py"


@pytest.fixture(scope="module")
def benchmark_module() -> Any:
    spec = importlib.util.spec_from_file_location("pair_packing", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_runs_small(benchmark_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pair_packing", "--small", "--out", str(tmp_path / "found.json")])
    benchmark_module.main()
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found) == {"pairs", "real_tokens_per_position", "speed", "threads"}
    shares = found["real_tokens_per_position"]
    assert shares["8 pairs, 1 rank"] == 1.0
    assert shares["8 pairs, padded"] < 0.6
    assert set(found["speed"]) == {"rounds", "parameters", "packed", "packed_4096", "padded_8", "padded_2"}


@pytest.mark.parametrize("together", [2, 8])
def test_padded_steps_are_the_packed_one(benchmark_module: Any, tmp_path: Path, together: int) -> None:
    store = benchmark_module.drawn_pairs(tmp_path, 16, 512)
    trainer = benchmark_module.make_trainer(store, benchmark_module.SMALL, 8, RowShape(None))
    expected = accumulate_gradients(trainer, 0).loss
    gradients = {name: parameter.grad.clone() for name, parameter in trainer.policy.model.named_parameters()}
    trainer.optimizer.zero_grad(set_to_none=True)
    pairs = (trainer.stream.batch(0).pair_sequences[0] // 2).tolist()
    micros = [benchmark_module.padded(store, pairs[start : start + together]) for start in range(0, 8, together)]
    totals = benchmark_module.totals_of(micros, 8)
    loss = sum(float(forward_backward(trainer, micro, totals, trainer.previous_load())[0]) for micro in micros) / 8
    assert loss == pytest.approx(expected, abs=1e-4)
    for name, parameter in trainer.policy.model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-3)
