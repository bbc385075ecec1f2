"""What is verified is what is loaded: every file is in the record, the record has a checksum, and nothing is read beside them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from keural.convert.export import ExportOptions, export
from keural.errors import UserError
from keural.files import fingerprint, sha256_file
from keural.model import KeuralConfig, KeuralMoECausalLM
from keural.pretrained.directory import save_model_directory
from keural.pretrained.lineage import check_sums
from keural.pretrained.stored_model import load_model, open_model, read_lineage
from keural.tokenizer import KeuralTokenizer

Keural = Callable[..., tuple[int, str, str]]
FILES = (
    "chat_template.jinja",
    "config.json",
    "configuration_keural.py",
    "generation_config.json",
    "keural.json",
    "model-00001-of-00005.safetensors",
    "model.safetensors.index.json",
    "modeling_keural.py",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)
EARLIER = ("model-", "tokenizer.model")
"""How the names begin of what records listed before version 2."""


@pytest.fixture
def copy(model_dir: Path, tmp_path: Path) -> Path:
    """A copy of a model directory with an index and several files of weights."""
    return Path(shutil.copytree(model_dir, tmp_path / "copy"))


def seal(directory: Path, **changes: Any) -> None:
    """Write the record anew so that it fits what lies there, as somebody would who wants it to be believed."""
    file = directory / "keural.json"
    record = json.loads(file.read_text()) | changes
    record["files"] = {path.name: sha256_file(path) for path in directory.iterdir() if path.is_file() and path != file}
    del record["checksum"]
    file.write_text(json.dumps({**record, "checksum": fingerprint(record)}))


def as_earlier(directory: Path) -> None:
    """Give a directory the record that the package wrote before version 2."""
    file = directory / "keural.json"
    record = json.loads(file.read_text())
    del record["checksum"], record["record"]
    record["files"] = {name: value for name, value in record["files"].items() if name.startswith(EARLIER)}
    file.write_text(json.dumps(record))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def others(directory: Path) -> dict[str, torch.Tensor]:
    """All weights of a directory, with other values."""
    tensors = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return {name: torch.randn_like(tensor) for name, tensor in tensors.items()}


def all_refuse(keural: Keural, directory: Path, scratch: Path, words: str) -> None:
    """Every command that opens the directory refuses it with one line, in which `words` occur."""
    for command in (
        ["inspect", directory, "--verify"],
        ["generate", directory, "--prompt", "hi", "--max-new-tokens", "1"],
        ["export", directory, scratch / "out", "--format", "hf"],
        ["import", directory, scratch / "out"],
    ):
        code, out, err = keural(*command)
        assert (code, err.count("\n")) == (2, 1), (command, out, err)
        assert words in err, (command, err)
    assert not (scratch / "out").exists()


def test_every_file_is_in_the_record(model_dir: Path) -> None:
    present = {file.name for file in model_dir.iterdir()}

    assert set(FILES) <= present
    assert read_lineage(model_dir)["files"].keys() == present - {"keural.json"}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["byte", "cut", "gone", "directory"])
def test_no_change_of_one_file_goes_unseen(copy: Path, tmp_path: Path, keural: Keural, name: str, damage: str) -> None:
    if (name, damage) == ("keural.json", "gone"):
        pytest.skip("a directory without a record says so")
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).unlink()
    if damage == "byte":
        (copy / name).write_bytes(data)
    elif damage == "cut":
        (copy / name).write_bytes(data[:-7])
    elif damage == "directory":
        (copy / name).mkdir()

    all_refuse(keural, copy, tmp_path, name)


def test_no_change_of_one_key_of_the_record_switches_checks_off(copy: Path) -> None:
    whole = json.loads((copy / "keural.json").read_text())
    for key in whole:
        for changed in ({**whole, key + "x": whole[key]}, {**whole, key: None}, whole):
            record = {name: value for name, value in changed.items() if changed[name] is None or name != key}
            (copy / "keural.json").write_text(json.dumps(record))
            with pytest.raises(UserError, match=r"keural\.json"):
                check_sums(copy)


SHADOWS = (
    "model.safetensors", "Model.safetensors", "other.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "adapter_config.json", "adapter_model.safetensors", "consolidated.00.pth", "model.gguf", "tf_model.h5", "CONFIG.JSON",
    "added_tokens.json", "special_tokens_map.json", "vocab.json", "tokenization_keural.py", "__init__.py", "processor_config.json",
    "model-00006-of-00005.safetensors", "additional_chat_templates",
)  # fmt: skip


@pytest.mark.parametrize("name", SHADOWS)
def test_a_file_that_might_be_read_in_place_of_another_is_refused(copy: Path, tmp_path: Path, keural: Keural, name: str) -> None:
    if name.endswith(".safetensors"):
        save_file(others(copy), copy / name, {"format": "pt"})
    elif "." in name:
        (copy / name).write_text("{}")
    else:
        (copy / name).mkdir()

    all_refuse(keural, copy, tmp_path, f"{name}: keural.json does not list it")
    as_earlier(copy)
    all_refuse(keural, copy, tmp_path, f"{name}: keural.json does not list it")


@pytest.mark.parametrize("record", ["whole", "none"])
def test_weights_beside_those_of_the_index_are_never_loaded(copy: Path, tmp_path: Path, keural: Keural, record: str) -> None:
    save_file(others(copy), copy / "model.safetensors", {"format": "pt"})
    seal(copy)
    if record == "none":
        (copy / "keural.json").unlink()

    all_refuse(keural, copy, tmp_path, "model.safetensors: lies beside the weights")


@pytest.mark.parametrize("record", ["whole", "none"])
@pytest.mark.parametrize(
    "key", ["transformers_weights", "attn_implementation", "_attn_implementation", "experts_implementation", "quantization_config"]
)
def test_a_configuration_names_neither_weights_nor_code(copy: Path, tmp_path: Path, keural: Keural, key: str, record: str) -> None:
    (copy / "other.bin").write_bytes(b"x")
    edit(copy / "config.json", **{key: "kernels-of/somebody"})
    seal(copy)
    if record == "none":
        (copy / "keural.json").unlink()

    all_refuse(keural, copy, tmp_path, f"has settings that this network does not know: {key}")


@pytest.mark.parametrize("target", ["../outside.safetensors", "/tmp/outside.safetensors", "a/b.safetensors", "a/.."])
def test_an_index_names_no_file_elsewhere(copy: Path, tmp_path: Path, keural: Keural, target: str) -> None:
    save_file(others(copy), tmp_path / "outside.safetensors", {"format": "pt"})
    index = copy / "model.safetensors.index.json"
    edit(index, weight_map=dict.fromkeys(json.loads(index.read_text())["weight_map"], target))
    seal(copy)

    all_refuse(keural, copy, tmp_path, "not a file beside it")


def test_hidden_weights_are_no_weights(copy: Path) -> None:
    expected = load_model(copy).state_dict()
    save_file(others(copy), copy / ".hidden.safetensors", {"format": "pt"})
    (copy / "model.safetensors.index.json").unlink()
    (copy / "keural.json").unlink()

    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_model(copy).state_dict().items())


def test_links_are_followed_and_their_content_is_compared(copy: Path, tmp_path: Path) -> None:
    """A hub's cache holds links; one that leads to another content is another file."""
    for file in list(copy.iterdir()):
        shutil.move(file, tmp_path / file.name)
        file.symlink_to(tmp_path / file.name)
    assert not check_sums(copy).uncovered

    edit(tmp_path / "config.json", rms_norm_eps=0.1)
    with pytest.raises(UserError, match=r"config\.json: does not match its checksum"):
        check_sums(copy)
    (copy / "config.json").unlink()
    (copy / "config.json").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"no config\.json"):
        load_model(copy)


def test_a_record_that_is_a_dangling_link_is_not_a_missing_one(copy: Path) -> None:
    (copy / "keural.json").unlink()
    (copy / "keural.json").symlink_to("nowhere")

    with pytest.raises(UserError, match=r"keural\.json: no such file"):
        check_sums(copy)


class TestWhatIsNotVerifiedIsSaid:
    """A missing or earlier record opens with one line; a check that was asked for and could not be made has not passed."""

    def test_without_a_record(self, copy: Path, tmp_path: Path, keural: Keural) -> None:
        expected = open_model(copy).weights.infos
        (copy / "keural.json").unlink()

        assert open_model(copy).weights.infos == expected
        code, out, err = keural("inspect", copy, "--verify")
        assert "verified: no record: nothing was verified" in out
        assert code == 2
        assert "no record: nothing was verified" in err
        assert keural("inspect", copy)[0] == 0
        for command in (
            ["generate", copy, "--prompt", "hi", "--max-new-tokens", "1"],
            ["export", copy, tmp_path / "out", "--format", "hf"],
        ):
            code, out, err = keural(*command)
            assert code == 0
            assert err.count("no record: nothing was verified") == 1
        assert "nothing was verified" in keural("import", copy, tmp_path / "again")[1]

    def test_with_a_record_of_an_earlier_version(self, copy: Path, tmp_path: Path, keural: Keural) -> None:
        as_earlier(copy)
        edit(copy / "config.json", rms_norm_eps=0.1)

        code, out, _ = keural("inspect", copy, "--verify")
        assert code == 0
        assert "which is of an earlier version; not verified: chat_template.jinja, config.json, configuration_keural.py" in out
        code, _, err = keural("export", copy, tmp_path / "out", "--format", "hf")
        assert code == 0
        assert "of an earlier version; not verified: chat_template.jinja, config.json" in err
        assert "--format hf` writes it with a whole record" in err
        assert check_sums(tmp_path / "out").notice is None

        data = bytearray((copy / FILES[5]).read_bytes())
        data[-1] ^= 1
        (copy / FILES[5]).write_bytes(data)
        all_refuse(keural, copy, tmp_path / "deep", f"{FILES[5]}: does not match its checksum")

    def test_an_earlier_record_without_its_list_is_damaged(self, copy: Path) -> None:
        as_earlier(copy)
        record = json.loads((copy / "keural.json").read_text())
        record["filez"] = record.pop("files")
        (copy / "keural.json").write_text(json.dumps(record))

        with pytest.raises(UserError, match="lists no files"):
            check_sums(copy)

    def test_a_record_of_a_newer_version(self, copy: Path) -> None:
        seal(copy, record=3)

        with pytest.raises(UserError, match="written by a newer version"):
            check_sums(copy)

    def test_the_card_may_be_edited(self, model_dir: Path, tmp_path: Path, keural: Keural) -> None:
        out = export(model_dir, tmp_path / "out", "hf", ExportOptions())
        (out / "README.md").write_text("# mine")
        (out / "LICENSE").write_text("text")
        (out / ".gitattributes").write_text("text")

        code, shown, _ = keural("inspect", out, "--verify")
        assert code == 0
        assert "not verified: .gitattributes, LICENSE, README.md" in shown
        assert keural("generate", out, "--prompt", "hi", "--max-new-tokens", "1")[2].count("verified") == 0


def test_renewed_code_is_listed_anew(copy: Path, keural: Keural) -> None:
    (copy / "modeling_keural.py").write_text("# of an earlier version")
    seal(copy)

    assert keural("refresh-code", copy)[0] == 0
    assert check_sums(copy).notice is None
    (copy / "modeling_keural.py").write_text("# changed since")
    assert keural("refresh-code", copy)[0] == 0
    assert check_sums(copy).notice is None


@pytest.mark.parametrize("format_name", ["hf", "granite", "gguf", "pt"])
def test_every_export_lists_every_file(model_dir: Path, tmp_path: Path, format_name: str) -> None:
    export(model_dir, tmp_path / "out", format_name, ExportOptions())

    coverage = check_sums(tmp_path / "out")
    assert set(coverage.verified) == {file.name for file in (tmp_path / "out").iterdir()} - {"keural.json"}
    assert not coverage.uncovered


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rope", [{"rope_type": "default", "rope_theta": 1e4}, {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}]
)
def test_the_network_is_the_one_that_transformers_loads(
    tmp_path: Path,
    make_config: Callable[..., KeuralConfig],
    tokenizer: KeuralTokenizer,
    dtype: torch.dtype,
    rope: dict[str, Any],
) -> None:
    torch.manual_seed(1)
    model = KeuralMoECausalLM(make_config(rope_parameters=rope)).to(dtype)
    out = save_model_directory(tmp_path / "m", model.config, model.state_dict(), tokenizer, {})

    ours, theirs = load_model(out, dtype=None), KeuralMoECausalLM.from_pretrained(out, dtype="auto")

    assert {name: value.dtype for name, value in ours.named_parameters()} == dict.fromkeys(dict(theirs.named_parameters()), dtype)
    for name, buffer in theirs.named_buffers():
        assert torch.equal(dict(ours.named_buffers())[name], buffer), name
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_a_directory_is_on_the_disk_before_it_has_its_name(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut right after the name appears must not leave empty files behind it."""
    out, flushed, fsync = tmp_path / "out", set[str](), os.fsync

    def noted(descriptor: int) -> None:
        if not out.exists():
            flushed.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    export(model_dir, out, "granite", ExportOptions())

    assert {file.name for file in out.iterdir()} <= flushed
