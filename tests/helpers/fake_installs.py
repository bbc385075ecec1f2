"""`vllm` and `sglang` as if they were installed: fakes that are started as the real ones are."""

import json
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = """import sys
sys.path[:0] = [{root!r}, {source!r}]
from tests.helpers.fake_engines import main
main([{kind!r}, *sys.argv[1:]])
"""


def install(monkeypatch: pytest.MonkeyPatch, directory: Path, kind: str, ids: Sequence[int], **told: Any) -> None:
    """Let `kind` be found; it writes `ids`."""
    directory.mkdir(exist_ok=True)
    code = RUN.format(root=str(ROOT), source=str(ROOT / "src"), kind=kind)
    monkeypatch.setenv("FAKE_ENGINE", json.dumps({"ids": list(ids)} | told))
    if kind == "vllm":
        program = directory / "vllm"
        program.write_text(f"#!{sys.executable}\n{code}", encoding="utf-8")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(directory), prepend=os.pathsep)
    else:
        package = directory / "sglang"
        package.mkdir(exist_ok=True)
        (package / "__init__.py").touch()
        (package / "launch_server.py").write_text(code, encoding="utf-8")
        monkeypatch.setenv("PYTHONPATH", str(directory), prepend=os.pathsep)
        monkeypatch.syspath_prepend(str(directory))


def install_script(monkeypatch: pytest.MonkeyPatch, directory: Path, script: str) -> None:
    """Let `vllm` be a shell script."""
    directory.mkdir(exist_ok=True)
    program = directory / "vllm"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(directory), prepend=os.pathsep)
