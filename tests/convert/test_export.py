"""Exports: the same logits in every engine, files that stand alone, and clear refusals."""

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GraniteMoeSWAForCausalLM

from keural.convert.export import FORMATS, ExportOptions, export
from keural.errors import UserError
from keural.files import sha256_file
from keural.model import KeuralConfig, KeuralMoECausalLM
from keural.pretrained.directory import save_model_directory
from keural.pretrained.stored_model import load_model, read_lineage
from keural.recipe import ChatSpec
from keural.tokenizer import KeuralTokenizer

LENGTH = 130
"""Tokens compared: more than ten windows of the fixture model."""


@pytest.fixture(scope="module")
def ids(tokenizer: KeuralTokenizer) -> torch.Tensor:
    return torch.randint(260, tokenizer.vocab_size - 2, (1, LENGTH), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, make_config: Callable[..., KeuralConfig], tokenizer: KeuralTokenizer) -> Path:
    """A model that every format can hold: heads divide the width. Its norms are not one, and its chat has settings of its own."""
    torch.manual_seed(7)
    model = KeuralMoECausalLM(make_config(initializer_range=0.2))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    lineage = {"recipe": "tiny", "stage": "sft-3", "chain": ["pretrain-1", "sft-3"], "source": {"step": 65849}}
    chat = ChatSpec(system="Be brief.", temperature=0.6)
    out = tmp_path_factory.mktemp("stored") / "model"
    return save_model_directory(out, model.config, model.state_dict(), tokenizer, lineage, chat)


@pytest.fixture(scope="module")
def expected(stored: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return load_model(stored)(ids).logits[0]


def one_by_one(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits `[T, V]` of a cached run over single tokens."""
    cache, rows = DynamicCache(config=model.config), []
    for position in range(ids.shape[1]):
        output = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        rows.append(output.logits[0, -1])
    return torch.stack(rows)


@pytest.mark.parametrize("format_name", ["hf", "granite"])
@torch.no_grad()
def test_transformers_gives_the_same_logits_at_once_and_token_by_token(
    tmp_path: Path, stored: Path, ids: torch.Tensor, expected: torch.Tensor, format_name: str
) -> None:
    out = export(stored, tmp_path / "out", format_name, ExportOptions())

    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=format_name == "hf").eval()

    torch.testing.assert_close(model(ids).logits[0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(one_by_one(model, ids), expected, atol=1e-5, rtol=0)
    greedy = {"max_new_tokens": 25, "do_sample": False, "repetition_penalty": 1.0}
    assert torch.equal(model.generate(ids[:, :40], **greedy), load_model(stored).generate(ids[:, :40], **greedy))


def test_granite_is_a_native_checkpoint_without_code(tmp_path: Path, stored: Path) -> None:
    out = export(stored, tmp_path / "out", "granite", ExportOptions(shard_bytes=50_000))

    _, info = GraniteMoeSWAForCausalLM.from_pretrained(out, output_loading_info=True)

    assert not any(info.values()), info
    assert list(out.glob("*.py")) == []
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    assert AutoTokenizer.from_pretrained(out)("안녕하세요 the cat")["input_ids"]


def test_hf_export_is_what_the_card_promises(tmp_path: Path, stored: Path, tokenizer: KeuralTokenizer) -> None:
    out = export(stored, tmp_path / "out", "hf", ExportOptions(license_id="apache-2.0"))

    config = json.loads((out / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["KeuralMoECausalLM"], "keural")
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.im_end_id
    assert (generation["temperature"], generation["top_p"], generation["repetition_penalty"]) == (0.6, 0.9, 1.1)
    assert "{%- generation -%}" in (out / "chat_template.jinja").read_text()
    assert {"tokenizer.json", "tokenizer_config.json", "modeling_keural.py", "configuration_keural.py"} <= {
        file.name for file in out.iterdir()
    }


def test_the_model_card_has_metadata_lineage_and_licence(tmp_path: Path, stored: Path) -> None:
    card = (export(stored, tmp_path / "stated", "hf", ExportOptions(license_id="mit")) / "README.md").read_text()
    silent = (export(stored, tmp_path / "silent", "granite", ExportOptions()) / "README.md").read_text()

    metadata = yaml.safe_load(card.split("---\n")[1])
    assert (metadata["license"], metadata["language"], metadata["pipeline_tag"]) == ("mit", ["ko", "en"], "text-generation")
    assert "pretrain-1 → sft-3" in card
    assert "training step: `65849`" in card
    assert "No licence was stated" in silent
    assert yaml.safe_load(silent.split("---\n")[1])["license"] == "other"


def test_the_model_card_says_what_was_measured(tmp_path: Path, stored: Path) -> None:
    seen = {"found": 50, "unknown": {}}
    scores = {
        "kobest_copa": {
            "score": 0.5625,
            "low": 0.5316,
            "high": 0.593,
            "n": 1000,
            "chance": 0.5,
            "language": "ko",
            "contamination": seen,
        },
        "prose": {"score": 1.6512, "low": None, "high": None, "n": 12, "chance": None, "language": "ko", "kind": "rolling"},
        "novel": {
            "score": 2.5,
            "n": 3,
            "language": None,
            "kind": "rolling",
            "baselines": {"xz_9": 2.75, "zstd_19": 3},
            "heldout": True,
        },
        "empty": {"score": None, "low": None, "high": None, "n": 0, "chance": 0.5},
    }
    for format_name in ("hf", "granite"):
        options = ExportOptions(scores=lambda: scores)
        card = (export(stored, tmp_path / format_name, format_name, options) / "README.md").read_text()
        assert "\n| kobest_copa | ko | 56.2% | 53.2% to 59.3% | 1,000 | 50.0% | 50 |\n" in card
        assert "\n| prose | ko | 1.651 bits/byte |  | 12 |  | not searched |\n" in card
        assert "\n| novel |  | 2.500 bits/byte (xz -9 2.750, zstd -19 3.000) |  | 3 |  | held out |\n" in card
        assert "| empty" not in card
    assert "## Evaluation" not in (export(stored, tmp_path / "silent", "hf", ExportOptions()) / "README.md").read_text()


def test_lineage_and_checksums_travel(tmp_path: Path, stored: Path) -> None:
    for name in FORMATS:
        written = export(stored, tmp_path / name, name, ExportOptions())
        record = json.loads((tmp_path / name / "keural.json").read_text())
        assert record["chain"] == ["pretrain-1", "sft-3"]
        assert record["files"]
        assert all(sha256_file(tmp_path / name / file) == sha for file, sha in record["files"].items())
        assert written.exists()


def test_pt_is_an_ordinary_pytorch_file(tmp_path: Path, stored: Path) -> None:
    file = export(stored, tmp_path / "pt", "pt", ExportOptions())

    assert file.name == "checkpoint_65849.pt"
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
    plain, mapped = torch.load(file, weights_only=True), torch.load(file, weights_only=True, mmap=True)
    assert plain["step"] == 65849
    assert all(torch.equal(tensor, mapped["model"][name]) for name, tensor in plain["model"].items())
    assert all(tensor.data_ptr() % 64 == 0 for tensor in mapped["model"].values())
    assert {file.name for file in file.parent.iterdir()} == {"checkpoint_65849.pt", "keural_tokenizer.model", "keural.json"}


def test_exporting_again_gives_the_same_weights(tmp_path: Path, stored: Path) -> None:
    first = export(stored, tmp_path / "first", "hf", ExportOptions())

    second = export(first, tmp_path / "second", "hf", ExportOptions())

    assert read_lineage(second) == read_lineage(first)


@pytest.mark.parametrize(
    ("format_name", "options", "message"),
    [
        ("onnx", ExportOptions(), "--format onnx: unknown; known are hf, granite, gguf, pt"),
        ("gguf", ExportOptions(quantize="q4_k"), "unknown \\(did you mean 'q4_k_m'"),
        ("pt", ExportOptions(quantize="q8_0"), "--quantize means nothing for --format pt"),
        ("gguf", ExportOptions(license_id="mit"), "--license means nothing for --format gguf"),
        ("gguf", ExportOptions(shard_bytes=9), "--shard-gb means nothing for --format gguf"),
    ],
)
def test_unknown_words_are_refused(tmp_path: Path, stored: Path, format_name: str, options: ExportOptions, message: str) -> None:
    with pytest.raises(UserError, match=message):
        export(stored, tmp_path / "out", format_name, options)
    assert not (tmp_path / "out").exists()


SHAPES: dict[str, tuple[dict[str, object], set[str]]] = {
    "full attention only": ({"sliding_window": None}, {"granite", "gguf", "pt"}),
    "odd layers slide": ({"layer_types": ["full_attention", "sliding_attention"]}, {"pt"}),
    "wide heads": ({"head_dim": 16}, {"granite"}),
    "stretched positions": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, {"granite", "gguf", "pt"},
    ),
    "another epsilon": ({"rms_norm_eps": 1e-6}, {"pt"}),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format_name", FORMATS)
def test_a_model_that_a_format_cannot_hold_is_refused(
    tmp_path: Path, make_config: Callable[..., KeuralConfig], tokenizer: KeuralTokenizer, shape: str, format_name: str
) -> None:
    changes, refusing = SHAPES[shape]
    config = make_config(**changes)
    source = save_model_directory(tmp_path / "m", config, KeuralMoECausalLM(config).state_dict(), tokenizer, {})

    if format_name in refusing:
        with pytest.raises(UserError, match="cannot be exported"):
            export(source, tmp_path / "out", format_name, ExportOptions())
        assert not (tmp_path / "out").exists()
    else:
        export(source, tmp_path / "out", format_name, ExportOptions())


def test_damaged_weights_are_not_exported(tmp_path: Path, stored: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(stored, tmp_path / "copy"))
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-9] ^= 1
    (copy / "model.safetensors").write_bytes(data)

    for name in FORMATS:
        with pytest.raises(UserError, match="does not match its checksum"):
            export(copy, tmp_path / "out", name, ExportOptions())


def test_a_model_without_tokenizer_is_told_what_it_lacks(tmp_path: Path, stored: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(stored, tmp_path / "copy"))
    (copy / "tokenizer.model").unlink()
    (copy / "keural.json").unlink()

    with pytest.raises(UserError, match=r"has no tokenizer.model.*--tokenizer"):
        export(copy, tmp_path / "out", "hf", ExportOptions())


def test_an_export_killed_in_the_middle_leaves_no_directory_of_that_name(tmp_path: Path, stored: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from keural.convert.export import *\n"
        "export(Path(sys.argv[1]), Path(sys.argv[2]), 'gguf', ExportOptions(), lambda count: os.kill(os.getpid(), 9))"
    )

    done = subprocess.run([sys.executable, "-c", program, str(stored), str(tmp_path / "out")], check=False)

    assert done.returncode == -9
    assert not (tmp_path / "out").exists()
    assert export(stored, tmp_path / "out", "gguf", ExportOptions()).is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
