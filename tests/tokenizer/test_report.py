"""The report on texts."""

from pathlib import Path

import pytest

from keural.errors import UserError
from keural.tokenizer import KeuralTokenizer, format_report, tokenizer_report


def test_figures_of_a_file_are_those_counted_by_hand(lossless: KeuralTokenizer, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("고양이를  바다합니다\n뷁", encoding="utf-8")
    tokens = len(lossless.encode("고양이를  바다합니다")) + 3
    row = tokenizer_report(lossless, [file])["rows"][0]
    assert row == {
        "file": str(file),
        "characters": 12,
        "tokens": tokens,
        "characters_per_token": round(12 / tokens, 3),
        "tokens_per_word": round(tokens / 3, 3),
        "bytes_per_token": round((10 * 3 + 2) / tokens, 3),
        "round_trip": 1.0,
        "byte_fallback": round(3 / tokens, 4),
    }


def test_lost_lines_are_counted(published: KeuralTokenizer, tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("if x:\n    y\nz\n    w", encoding="utf-8")
    assert tokenizer_report(published, [file])["rows"][0]["round_trip"] == 0.5


def test_total_is_over_all_files(lossless: KeuralTokenizer, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text("고양이 the cat\n" * 3, encoding="utf-8")
    report = tokenizer_report(lossless, [tmp_path / "a", tmp_path / "b"])
    assert report["total"]["tokens"] == 2 * report["rows"][0]["tokens"]
    assert report["total"]["characters_per_token"] == report["rows"][0]["characters_per_token"]
    lines = format_report(report).split("\n")
    assert len(lines) == 1 + 1 + 2 + 1
    assert lines[-1].startswith("total ")


def test_empty_file_is_reported_without_division_by_zero(lossless: KeuralTokenizer, tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert tokenizer_report(lossless, [tmp_path / "empty"])["rows"][0]["tokens"] == 0


def test_files_that_cannot_be_read_are_refused(lossless: KeuralTokenizer, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        tokenizer_report(lossless, [tmp_path / "binary"])
    with pytest.raises(UserError, match="no such file"):
        tokenizer_report(lossless, [tmp_path / "absent"])
    with pytest.raises(UserError, match="no files"):
        tokenizer_report(lossless, [])
