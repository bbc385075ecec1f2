"""`keural.json` and `config.json` from somebody else: one line, exit code 2, and nothing outside the directory that was named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from keural.convert.export import ExportOptions, export
from keural.errors import UserError
from keural.files import atomic_directory, fingerprint, sha256_file
from keural.model import KeuralMoECausalLM
from keural.pretrained.directory import save_model_directory
from keural.pretrained.lineage import check_sums, file_name
from keural.tokenizer import KeuralTokenizer

Keural = Callable[..., tuple[int, str, str]]


@pytest.fixture
def copy(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "copy"))


def edit(directory: Path, name: str, **changes: object) -> None:
    """Change a JSON file and write the record anew, as somebody would who wants it to be believed."""
    file = directory / name
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(values))
    record = values if name == "keural.json" else json.loads((directory / "keural.json").read_text())
    record["files"] |= {name: sha256_file(file)} if name != "keural.json" else {}
    seal(directory, record)


def seal(directory: Path, record: object) -> None:
    """Write a record with the checksum of itself that it should have."""
    if isinstance(record, dict):
        record = {"record": 2} | {key: value for key, value in record.items() if key != "checksum"}
        record["checksum"] = fingerprint(record)
    (directory / "keural.json").write_text(json.dumps(record))


DAMAGED: list[object] = [
    [],
    "text",
    {"files": []},
    {"files": {"a": 3}},
    {"chat": []},
    {"chat": {"temperature": "hot"}},
    {"chat": {"temperature": -1}},
    {"chat": {"unknown": 1}},
    {"source": "a checkpoint"},
    {"source": {"step": "x/../../elsewhere"}},
    {"source": {"step": -1}},
    {"chain": 5},
    {"files": {"../../../etc/hostname": "0"}},
]


@pytest.mark.parametrize("content", DAMAGED, ids=str)
def test_damaged_lineage_is_one_line_everywhere(copy: Path, tmp_path: Path, keural: Keural, content: object) -> None:
    seal(copy, content)

    commands: list[list[object]] = [["inspect", copy], ["generate", copy, "--prompt", "hello", "--max-new-tokens", "1"]]
    commands += [["export", copy, tmp_path / "out", "--format", name] for name in ("hf", "granite", "gguf", "pt")]
    for command in commands:
        code, out, err = keural(*command)
        assert (code, out, err.count("\n")) == (2, "", 1), (command, err)
        assert "keural.json" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "a/b", "..", "\x1b[31mred"])
def test_names_stay_inside_the_output(copy: Path, tmp_path: Path, name: str) -> None:
    edit(copy, "keural.json", recipe=name, stage="x")

    file = export(copy, tmp_path / "deep" / "out", "gguf", ExportOptions())

    assert file.parent == tmp_path / "deep" / "out"
    assert file.is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"copy", "deep"}


def test_file_names_are_plain() -> None:
    assert file_name("../../a b/ㄱ.c") == "a-b-ㄱ.c"
    assert file_name("...") == "model"


def test_a_file_that_is_not_listed_is_not_taken_for_checked(copy: Path) -> None:
    with pytest.raises(UserError, match=r"other.gguf: keural.json does not list it"):
        check_sums(copy, ["other.gguf"])


CONFIGS: dict[str, dict[str, object]] = {
    "window": {"sliding_window": 8.5},
    "window true": {"sliding_window": True},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
    "theta text": {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}},
    "rope type": {"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}},
    "rope list": {"rope_parameters": [1]},
    "epsilon": {"rms_norm_eps": -1.0},
    "activation": {"hidden_act": "foo"},
    "dtype": {"dtype": "foo"},
    "labels": {"id2label": 5},
    "layers": {"num_hidden_layers": 10**9},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_impossible_configurations_are_one_line_everywhere(copy: Path, tmp_path: Path, keural: Keural, kind: str) -> None:
    edit(copy, "config.json", **CONFIGS[kind])

    for command in (
        ["inspect", copy],
        ["export", copy, tmp_path / "out", "--format", "granite"],
        ["generate", copy, "--prompt", "hello", "--max-new-tokens", "1"],
    ):
        code, out, err = keural(*command)
        assert (code, out, err.count("\n")) == (2, "", 1), (command, err)
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite_are_neither_exported_nor_generated_from(
    tmp_path: Path, model: KeuralMoECausalLM, tokenizer: KeuralTokenizer, keural: Keural
) -> None:
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights["model.norm.weight"][3] = torch.nan
    source = save_model_directory(tmp_path / "m", model.config, weights, tokenizer, {})

    for name in ("hf", "granite", "gguf", "pt"):
        with pytest.raises(UserError, match=r"model.norm.weight has values that are not finite"):
            export(source, tmp_path / "out", name, ExportOptions())
    code, _, err = keural("generate", source, "--prompt", "hello")
    assert (code, err.count("\n")) == (2, 1)
    assert "not finite" in err


def test_weights_too_large_for_a_type_are_not_turned_into_infinities(
    tmp_path: Path, model: KeuralMoECausalLM, tokenizer: KeuralTokenizer
) -> None:
    weights = {name: tensor * (1e6 if "q_proj" in name else 1) for name, tensor in model.state_dict().items()}
    source = save_model_directory(tmp_path / "m", model.config, weights, tokenizer, {})

    with pytest.raises(UserError, match="do not fit into F16"):
        export(source, tmp_path / "out", "gguf", ExportOptions(quantize="f16"))
    assert not (tmp_path / "out").exists()


class TestOutput:
    """Where a directory is written."""

    def test_links_and_the_current_directory_are_refused_at_once(
        self, tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "link").symlink_to("empty")
        (tmp_path / "dangling").symlink_to("nothing")
        monkeypatch.chdir(tmp_path / "empty")

        for out in (Path(), tmp_path / "link", tmp_path / "dangling"):
            with pytest.raises(UserError, match="a link, a mount point or the current directory"):
                export(model_dir, out, "hf", ExportOptions())

    def test_a_neighbour_of_a_similar_name_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / ".out.tmp").mkdir()
        (tmp_path / ".out.tmp" / "mine").write_text("keep")
        (tmp_path / ".out.4194305.tmp").mkdir()  # no process has this number

        with atomic_directory(tmp_path / "out") as directory:
            (directory / "x").write_text("")

        assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.tmp"}
        assert (tmp_path / ".out.tmp" / "mine").read_text() == "keep"


class TestForeignSettings:
    """What a foreign configuration says and this network cannot do."""

    @pytest.mark.parametrize(
        "setting", [{"rope_scaling": {"factor": 4.0}}, {"attention_bias": True}, {"norm_topk_prob": False}], ids=str
    )
    def test_settings_that_would_change_the_network_are_refused(
        self, tmp_path: Path, state_dict: dict[str, torch.Tensor], keural: Keural, setting: dict[str, object]
    ) -> None:
        from tests.helpers.published_model import SHAPE, as_safetensors

        source = as_safetensors(tmp_path / "st", state_dict, SHAPE | setting)

        code, _, err = keural("import", source, tmp_path / "out")

        assert (code, err.count("\n")) == (2, 1)
        assert next(iter(setting)) in err
        assert not (tmp_path / "out").exists()
        assert keural("inspect", source)[0] == 0
        neutral = {"rope_scaling": None, "attention_bias": False, "norm_topk_prob": True, "torch_dtype": "float32"}
        (source / "config.json").write_text(json.dumps(SHAPE | neutral))
        assert keural("import", source, tmp_path / "out")[0] == 0


def test_a_crafted_gguf_does_not_hang_inspect(tmp_path: Path, keural: Keural) -> None:
    import struct

    pytest.importorskip("gguf", reason="the gguf package is not installed (extra gguf)")
    entry = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 0, 2**40)
    (tmp_path / "x.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + entry)

    code, out, err = keural("inspect", tmp_path / "x.gguf")

    assert (code, out, err.count("\n")) == (2, "", 1)
