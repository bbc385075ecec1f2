"""Bad input through the command: exit code 2, one line that names the place, and no store, whole or half."""

import gzip
import io
import json
import lzma
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from keural.cli.app import main

GOOD = "".join(
    json.dumps({"text": f"문서 {number}번입니다. It rained {number**3} times."}, ensure_ascii=False) + "\n" for number in range(300)
)
TALK = {"utterances": [{"role": "질문자", "text": "왜요?"}, {"role": "전문가", "text": "그래서요."}]}


def zipped(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


TALK_BYTES = json.dumps(TALK).encode()
CASES: list[tuple[str, bytes, str, list[str]]] = [
    ("bad.jsonl", b'{"body": "a"}\n', "fineweb", ["bad.jsonl:1", "adapter fineweb", "no key 'text'", "body"]),
    ("bad.jsonl", GOOD.encode()[:200] + b"\xff\xfe\x00\x01" * 500, "fineweb", ["bad", "bad.jsonl"]),
    ("bad.jsonl", bytes(range(256)) * 40, "fineweb", ["bad.jsonl", "not clear how it is encoded", "options: {encoding: NAME}"]),
    ("bad.zip", zipped("../x.json", TALK_BYTES), "aihub_045", ["bad.zip", "leads out of the archive"]),
    ("bad.zip", zipped("x.json", b" " * (1 << 22)), "aihub_045", ["bad.zip", "zip bomb"]),
    ("bad.zip", half(zipped("x.json", TALK_BYTES)), "aihub_045", ["bad.zip", "not a whole zip archive"]),
    ("bad.jsonl.gz", half(gzip.compress(GOOD.encode())), "fineweb", ["bad.jsonl.gz", "damaged gzip file", "fetch it again"]),
    ("bad.jsonl.xz", half(lzma.compress(GOOD.encode())), "fineweb", ["bad.jsonl.xz", "damaged xz file", "fetch it again"]),
    ("bad.parquet", b"PAR1" + b"\0" * 90, "fineweb", ["bad.parquet", "not a readable Parquet file", "fetch it again"]),
    ("bad.jsonl", b"\n\n", "fineweb", ["source 'bad'", "holds no rows"]),
    ("bad.jsonl", b"", "fineweb", ["bad.jsonl", "the file is empty"]),
]


@pytest.mark.parametrize(("file", "content", "adapter", "words"), CASES)
def test_one_line_and_nothing_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    file: str,
    content: bytes,
    adapter: str,
    words: list[str],
) -> None:
    data, recipe, out = tmp_path / "data", tmp_path / "recipe", tmp_path / "out"
    data.mkdir()
    recipe.mkdir()
    (data / "good.jsonl").write_text(GOOD)
    (data / file).write_bytes(content)
    good = {"name": "good", "adapter": "text", "path": "good.jsonl"}
    world = {"name": "world", "adapter": "microworld", "options": {"part": "prose", "count": 800}}
    tokenizer = {"vocab_size": 700, "sources": [world]}
    write(recipe / "recipe.yaml", {"name": "bad", "data": str(data), "tokenizer": tokenizer, "stages": ["stage"]})
    objective = "sft" if adapter.startswith("aihub") else "next_token"
    sources = [*([good] if objective == "next_token" else []), {"name": "bad", "adapter": adapter, "path": file}]
    stage = {
        "name": "stage",
        "objective": objective,
        "data": {"sequence_length": 64, "sources": sources},
        "train": {"steps": 1, "lr": 1e-3, "batch_tokens": 64},
    }
    write(recipe / "stage.yaml", stage)
    monkeypatch.setattr("sys.argv", ["keural", "data", "prepare", str(recipe), "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert all(word in line for word in words), line
    assert not list(out.rglob("*.ds")), "no store is left"
    assert not [path for path in out.rglob("*") if path.name.endswith((".tmp", ".parts"))]


def write(path: Path, value: Any) -> None:
    path.write_text(yaml.safe_dump(value, allow_unicode=True))
