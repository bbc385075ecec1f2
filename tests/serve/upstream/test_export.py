"""The export that an engine of ours reads: found where it is that of these weights, made whole or not at all."""

import shutil
from pathlib import Path

import pytest

from keural.convert.export import ExportOptions, export
from keural.errors import UserError
from keural.model import KeuralMoECausalLM
from keural.pretrained.directory import save_model_directory
from keural.serve.upstream import models
from keural.serve.upstream.models import beside, find_export, front_model
from keural.tokenizer import KeuralTokenizer


@pytest.fixture
def directory(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def stamps(place: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in place.iterdir()}


def test_an_export_is_made_once_beside_the_model(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    place = find_export(front_model(directory), None)

    assert place == beside(directory) == directory.with_name("model-granite")
    assert str(place) in capfd.readouterr().out
    before = stamps(place)
    assert find_export(front_model(directory), None) == place
    assert stamps(place) == before
    assert capfd.readouterr().out == ""


def test_an_export_that_somebody_made_is_found_by_its_name(directory: Path, tmp_path: Path) -> None:
    export(directory, tmp_path / "mine", "granite", ExportOptions())

    assert find_export(front_model(directory), tmp_path / "mine") == tmp_path / "mine"
    assert not beside(directory).exists()


def test_an_export_is_a_model_to_serve_itself(directory: Path, tmp_path: Path, tokenizer: KeuralTokenizer) -> None:
    export(directory, tmp_path / "mine", "granite", ExportOptions())

    found = front_model(tmp_path / "mine")

    assert find_export(found, None) == tmp_path / "mine"
    assert found.tokenizer.encode("the cat 고양이") == tokenizer.encode("the cat 고양이")
    assert found.context_length == front_model(directory).context_length == 160


def test_the_export_of_other_weights_is_refused_and_left_alone(
    directory: Path, tmp_path: Path, model: KeuralMoECausalLM, tokenizer: KeuralTokenizer
) -> None:
    state = {name: tensor * 1.5 if "norm" in name else tensor for name, tensor in model.state_dict().items()}
    other = save_model_directory(tmp_path / "other", model.config, state, tokenizer, {"recipe": "tiny"})
    place = find_export(front_model(other), beside(directory))
    before = stamps(place)

    with pytest.raises(UserError, match=r"model-granite: is not the `granite` export of .*--export"):
        find_export(front_model(directory), None)

    assert stamps(place) == before


@pytest.mark.parametrize("what", ["another format", "foreign files", "a file"])
def test_what_is_no_export_is_refused_and_left_alone(directory: Path, what: str) -> None:
    place = beside(directory)
    if what == "another format":
        export(directory, place, "hf", ExportOptions())
    elif what == "a file":
        place.write_text("mine", encoding="utf-8")
    else:
        place.mkdir()
        (place / "notes.txt").write_text("mine", encoding="utf-8")

    with pytest.raises(UserError, match="is not the `granite` export"):
        find_export(front_model(directory), None)

    assert place.exists()


def test_a_damaged_export_is_refused(directory: Path) -> None:
    place = find_export(front_model(directory), None)
    file = next(place.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)

    with pytest.raises(UserError, match="does not match its checksum"):
        find_export(front_model(directory), None)


def test_an_export_that_fails_leaves_nothing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("keural.convert.granite.write_record", fail)
    with pytest.raises((OSError, UserError)):
        find_export(front_model(directory), None)

    assert sorted(file.name for file in directory.parent.iterdir()) == ["model"]
    monkeypatch.undo()
    assert find_export(front_model(directory), None).is_dir()


def test_a_model_that_the_format_cannot_hold_is_refused_before_anything_else(
    tmp_path: Path, model: KeuralMoECausalLM, tokenizer: KeuralTokenizer
) -> None:
    state = model.state_dict()
    config = type(model.config)(**(model.config.to_dict() | {"sliding_window": None, "layer_types": None}))
    directory = save_model_directory(tmp_path / "unlike", config, state, tokenizer, {"recipe": "tiny"})

    with pytest.raises(UserError, match="cannot be exported as granite"):
        front_model(directory)


def test_a_model_without_a_record_has_an_export_too(directory: Path) -> None:
    (directory / "keural.json").unlink()
    place = find_export(front_model(directory), None)
    assert find_export(front_model(directory), None) == place


def test_nothing_but_a_model_is_fronted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        front_model(tmp_path / "nowhere")
    assert models.GRANITE == "granite"
