"""Engines by name: which one runs a path, and what is said when none does."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from keural.errors import UserError
from keural.serve.engines.paths import gguf_file
from keural.serve.engines.registry import chat_defaults, open_engine
from keural.serve.engines.sampling_params import SamplingParams
from keural.serve.engines.transformers import TransformersEngine

HEAVY = "import sys, keural.serve.engines.registry; print([name for name in ('llama_cpp', 'gguf') if name in sys.modules])"


@pytest.fixture
def gguf_dir(tmp_path: Path, model_dir: Path) -> Path:
    """A directory that looks like a GGUF export; the file in it is never read here."""
    out = tmp_path / "gguf"
    out.mkdir()
    for name in ("keural.json", "tokenizer.model"):
        shutil.copy(model_dir / name, out)
    (out / "tiny-Q8_0.gguf").write_bytes(b"GGUF")
    return out


def test_a_model_directory_runs_in_transformers(model_dir: Path) -> None:
    assert isinstance(open_engine(model_dir), TransformersEngine)


def test_a_gguf_file_and_its_directory_are_the_same_model(gguf_dir: Path) -> None:
    file = gguf_dir / "tiny-Q8_0.gguf"

    assert gguf_file(gguf_dir) == gguf_file(file) == file
    assert chat_defaults(gguf_dir) == chat_defaults(file) == (SamplingParams(), "Be brief.")


def test_defaults_come_from_the_directory(model_dir: Path) -> None:
    assert chat_defaults(model_dir) == (SamplingParams(), "Be brief.")


def test_defaults_are_the_cards_where_nothing_is_said(gguf_dir: Path) -> None:
    (gguf_dir / "keural.json").unlink()

    assert chat_defaults(gguf_dir) == (SamplingParams(), None)


def refusal(path: Path, name: str | None = None) -> str:
    with pytest.raises(UserError) as refused:
        open_engine(path, name)
    return str(refused.value)


def test_what_an_engine_does_not_run_is_refused_with_advice(model_dir: Path, gguf_dir: Path, tmp_path: Path) -> None:
    assert "make one with `keural export" in refusal(model_dir, "llama.cpp")
    assert "use --engine llama.cpp" in refusal(gguf_dir, "transformers")
    assert "not a model directory" in refusal(tmp_path)
    assert "no such file" in refusal(tmp_path / "missing.gguf")


def test_an_unknown_name_is_refused_with_the_known_ones(model_dir: Path) -> None:
    assert refusal(model_dir, "lama.cpp") == (
        "unknown engine 'lama.cpp' (did you mean 'llama.cpp'?); use one of transformers, llama.cpp"
    )


def test_several_gguf_files_must_be_told_apart(gguf_dir: Path) -> None:
    (gguf_dir / "tiny-F16.gguf").write_bytes(b"GGUF")

    assert "holds 2 GGUF files (tiny-F16.gguf, tiny-Q8_0.gguf); name one of them" in refusal(gguf_dir)


def test_nothing_is_imported_for_engines_that_are_not_used() -> None:
    assert subprocess.run([sys.executable, "-c", HEAVY], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_command_says_how_to_install_an_engine(gguf_dir: Path, keural: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.delitem(sys.modules, "keural.serve.engines.llama_cpp", raising=False)

    code, _, error = keural("generate", gguf_dir, "--prompt", "the cat")

    assert code == 2
    assert error == ("keural: error: the llama.cpp engine is not installed; install it with `pip install 'keural[llama]'`\n")
