"""Names, keys, rows, paths, samples and settings of a stranger reach no terminal raw, whatever the command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

EVIL = "\x1b]0;t\x07\x1b[31m\x9b2J\u202eevil\u2066 [bold]x[/x]"
RAW = ("\x1b", "\x07", "\x9b", "\u202e", "\u2066")
NAME = "set\x1b[31m\u202e[bold]"


def source(name: str, file: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "adapter": "text", "path": file, "max_drop": 1.0, **more}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of one stage whose every text is hostile, and a run directory of such a name."""
    directory = tmp_path_factory.mktemp("evil") / "a\x1b[31m[bold]"
    (directory / "data").mkdir(parents=True)
    words = "the sea is wide and two small birds see a red house in the garden on Monday morning with eleven cats".split()  # noqa: SIM905
    texts = [" ".join(words[(start * step) % 21] for step in range(1, 14)) for start in range(1, 300)]
    rows = [json.dumps({"text": f"{text} {EVIL}"}) for text in texts]
    rows += [json.dumps({EVIL: 1}), '{"text": \x1b[31m', json.dumps({"text": ""})]
    (directory / "data" / f"{NAME}.jsonl").write_text("\n".join(rows))
    (directory / "data" / "wrong.jsonl").write_text(json.dumps({EVIL: 1}) + "\n")
    recipe = directory / "recipe"
    recipe.mkdir()
    prose = source(NAME, f"{NAME}.jsonl")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    shape |= {"head_dim": 8, "num_local_experts": 4, "max_position_embeddings": 512}
    top = {
        "name": "evil", "description": EVIL, "notes": [EVIL], "data": str(directory / "data"), "stages": ["base"], "model": shape,
        "tokenizer": {"vocab_size": 340, "sources": [prose]}, "chat": {"samples": [EVIL], "system": EVIL, "max_new_tokens": 8},
    }  # fmt: skip
    data = {"sequence_length": 64, "heldout_per_mille": 20, "sources": [{**prose, "expect": 1, "license": EVIL}]}
    stage = {"name": "base", "objective": "next_token", "data": data, "notes": [EVIL]}
    stage["train"] = {"steps": 2, "batch_tokens": 128, "lr": 0.001}
    (recipe / "recipe.yaml").write_text(yaml.safe_dump(top))
    (recipe / "base.yaml").write_text(yaml.safe_dump(stage))
    return directory


@pytest.fixture
def clean(keural: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """Run a command; whatever it says must be escaped, and one line where it refuses."""

    def run(*arguments: object, code: int = 0) -> str:
        ended, out, err = keural(*arguments)
        assert ended == code, err
        assert not [character for character in RAW if character in out + err]
        assert "Traceback" not in err
        assert code != 2 or err.count("\n") == 1
        return out + err

    return run


def test_every_command(place: Path, clean: Callable[..., str]) -> None:
    out, recipe = place / "run\x1b]0;t\x07[" / "x]", place / "recipe"
    escaped = "\\x1b]0;t\\x07\\x1b[31m\\x9b2J\\u202eevil\\u2066 [bold]x[/x]"
    assert yaml.safe_load(clean("recipe", recipe))["recipe"]["description"] == EVIL
    assert "set\\x1b[31m\\u202e[bold]" in clean("data", "prepare", recipe, "--out", out).replace("\n", "").replace("│", "").replace(
        " ", ""
    )
    assert "\\x1b" in clean("data", "show", recipe / "base.yaml", "--out", out, "--rows", 99)
    assert "set\\x1b[31m\\u202e[bold]" in clean("data", "stats", recipe, "--out", out)
    assert json.loads(clean("data", "stats", recipe, "--out", out, "--json"))
    assert escaped in clean("run", recipe, "--out", out)
    clean("inspect", out / "final")
    assert json.loads(clean("inspect", out / "final", "--json"))
    prepared = next(path for path in (out / "data").iterdir() if path.is_dir())
    for inside in (prepared, prepared / "train"):
        clean("data", "stats", inside)
    clean("tokenizer", "report", out / "tokenizer", place / "data" / f"{NAME}.jsonl")
    clean("tokenizer", "convert", out / "tokenizer" / "tokenizer.model", place / "tok\x1b[31m")
    clean("export", out / "final", place / "hf\x1b[31m", "--format", "hf")
    clean("import", place / "hf\x1b[31m", place / "im\x1b[31m")
    clean("data", "export", prepared / "train", place / "meg\x1b[31m", "--format", "megatron")
    megatron = ("--format", "megatron", "--tokenizer", out / "tokenizer")
    clean("data", "import", place / "meg\x1b[31m", place / "st\x1b[31m", *megatron)
    html = (out / "report.html").read_text(encoding="utf-8")
    assert not [character for character in RAW if character in html]
    assert "\\u202eevil" in html


def test_every_refusal(place: Path, clean: Callable[..., str]) -> None:
    recipe, out = place / "recipe", place / "other"
    clean("data", "prepare", recipe, "base.data.sources=[]", "--out", out, code=2)
    clean("data", "prepare", recipe, f"base.data.heldout_sources=[{{name: a, adapter: '{NAME}'}}]", code=2)
    clean("run", recipe, f"{EVIL}=1", code=2)
    clean("run", place / EVIL, code=2)
    clean("train", place / EVIL, code=2)
    clean("run", recipe, "--until", EVIL, code=2)
    clean("chat", place / EVIL, code=2)
    clean("generate", place, "--prompt", "x", "--engine", EVIL, code=2)
    clean("inspect", place / EVIL, code=2)
    clean("export", place / EVIL, out, "--format", "hf", code=2)
    clean("import", place / EVIL, out, code=2)
    clean("data", "stats", place / EVIL, code=2)
    clean("tokenizer", "report", place / EVIL, place / EVIL, code=2)


def test_keys_of_a_row_in_the_refusal_of_a_source(place: Path, tmp_path: Path, clean: Callable[..., str]) -> None:
    stage = yaml.safe_load((place / "recipe" / "base.yaml").read_text())
    stage["data"]["sources"] = [source(NAME, "wrong.jsonl")]
    (tmp_path / "recipe.yaml").write_text((place / "recipe" / "recipe.yaml").read_text())
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(stage))
    assert "\\x1b[31m" in clean("data", "prepare", tmp_path, "--out", tmp_path / "out", code=2)
