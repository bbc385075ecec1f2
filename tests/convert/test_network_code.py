"""The code that a model directory carries: noticed when it is not this package's, and renewed by one command."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import keural.model
from keural import files
from keural.convert.export import ExportOptions, export
from keural.convert.inspection import inspect_model
from keural.errors import UserError
from keural.files import write_atomic
from keural.pretrained import network_code
from keural.pretrained.lineage import LINEAGE, check_sums, list_again
from keural.pretrained.network_code import NETWORK_CODE, has_other_code, other_code_line, package_code, refresh_code
from keural.serve.engines.sampling_params import SamplingParams
from keural.serve.generate import run_generate

Keural = Callable[..., tuple[int, str, str]]

MODELING = NETWORK_CODE[1]
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12)


@pytest.fixture
def earlier(tmp_path: Path, model_dir: Path) -> Path:
    """The model as an earlier version wrote it, with a network that drops what it does not know."""
    copy = Path(shutil.copytree(model_dir, tmp_path / "earlier"))
    source = (copy / MODELING).read_text(encoding="utf-8")
    (copy / MODELING).write_text(source.replace("self._check_arguments(kwargs, position_ids)", "pass"), encoding="utf-8")
    list_again(copy, NETWORK_CODE)
    return copy


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_a_directory_of_this_version_carries_this_packages_code(model_dir: Path) -> None:
    package = Path(keural.model.__path__[0])
    assert all((model_dir / name).read_bytes() == (package / name).read_bytes() for name in NETWORK_CODE)
    assert not has_other_code(model_dir)
    assert other_code_line(model_dir) is None
    assert inspect_model(model_dir)["code"] == "this package's"


@pytest.mark.parametrize("name", NETWORK_CODE)
@pytest.mark.parametrize("change", ["a space", "removed"])
def test_every_difference_is_noticed(earlier: Path, model_dir: Path, name: str, change: str) -> None:
    for file in NETWORK_CODE:
        shutil.copyfile(model_dir / file, earlier / file)
    if change == "removed":
        (earlier / name).unlink()
    else:
        (earlier / name).write_bytes((earlier / name).read_bytes() + b" ")

    assert has_other_code(earlier)


def test_a_directory_without_code_is_no_matter(earlier: Path) -> None:
    for name in NETWORK_CODE:
        (earlier / name).unlink()

    assert other_code_line(earlier) is None
    assert inspect_model(earlier)["code"] == "none"
    with pytest.raises(UserError, match="carries no network code"):
        refresh_code(earlier)


def test_the_line_says_what_is_wrong_and_what_to_do(earlier: Path, keural: Keural) -> None:
    line = other_code_line(earlier)

    assert line is not None
    assert "other network code" in line
    assert f"`keural refresh-code {earlier}`" in line
    assert line.count("\n") == 0
    assert "keural refresh-code" in inspect_model(earlier)["code"]
    assert "keural refresh-code" in keural("inspect", earlier)[1]


def test_the_command_puts_this_packages_code_there_and_touches_nothing_else(earlier: Path, keural: Keural) -> None:
    before = contents(earlier)

    code, out, err = keural("refresh-code", earlier)

    assert (code, err) == (0, "")
    assert out == f"{earlier}: now carries this package's network code\n"
    after = contents(earlier)
    assert {name for name in after if after[name] != before[name]} == {MODELING, LINEAGE}
    assert after.keys() == before.keys()
    assert not has_other_code(earlier)
    check_sums(earlier)
    assert keural("refresh-code", earlier)[:2] == (0, f"{earlier}: already carried this package's network code\n")


def test_a_renewal_that_was_interrupted_is_finished_by_the_next(
    earlier: Path, keural: Keural, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it was killed between the files or before the record."""
    for write in (1, 2, 3):
        shutil.copytree(earlier, copy := earlier.with_name(f"copy-{write}"))
        with monkeypatch.context() as killing:
            kill_at_write(write, killing)
            with pytest.raises(KeyboardInterrupt):
                refresh_code(copy)

        refresh_code(copy)

        assert not has_other_code(copy)
        check_sums(copy)


def kill_at_write(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = [0]

    def write_or_die(path: Path, content: str | bytes) -> None:
        writes[0] += 1
        if writes[0] == number:
            raise KeyboardInterrupt
        write_atomic(path, content)

    monkeypatch.setattr(network_code, "write_atomic", write_or_die)
    monkeypatch.setattr(files, "write_atomic", write_or_die)


def test_the_command_takes_what_every_command_takes(earlier: Path, tmp_path: Path) -> None:
    """A stage or a run directory, as `keural chat` does."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "final").symlink_to(earlier)

    assert refresh_code(tmp_path / "run")
    assert not has_other_code(earlier)


def test_a_link_to_a_shared_file_is_replaced_and_the_file_is_not(earlier: Path, tmp_path: Path) -> None:
    """Caches of a hub keep files elsewhere, for several directories."""
    (earlier / MODELING).rename(tmp_path / "blob")
    (earlier / MODELING).symlink_to(tmp_path / "blob")
    shared = (tmp_path / "blob").read_bytes()

    assert refresh_code(earlier)
    assert (tmp_path / "blob").read_bytes() == shared
    assert not has_other_code(earlier)


@pytest.mark.parametrize("config", [None, '{"model_type": "llama"}', "nonsense"])
def test_only_a_keural_model_is_written_to(earlier: Path, config: str | None, keural: Keural) -> None:
    (earlier / "config.json").unlink()
    if config is not None:
        (earlier / "config.json").write_text(config, encoding="utf-8")
    before = contents(earlier)

    code, out, err = keural("refresh-code", earlier)

    assert (code, out, err.count("\n")) == (2, "", 1)
    assert contents(earlier) == before


def test_exporting_again_writes_this_packages_code(earlier: Path, tmp_path: Path) -> None:
    assert not has_other_code(export(earlier, tmp_path / "again", "hf", ExportOptions()))


def test_generating_says_one_line_and_answers_with_this_packages_network(
    earlier: Path, model_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    answers = []
    for directory in (model_dir, earlier):
        assert run_generate(directory, "the cat", GREEDY, engine_name="transformers") == 0
        answers.append(capfd.readouterr())

    assert answers[0].out == answers[1].out
    said = [line for line in answers[1].err.splitlines() if line not in answers[0].err.splitlines()]
    assert said == [f"({other_code_line(earlier)})"]


def test_the_fingerprint_is_of_both_files() -> None:
    assert len(package_code()) == 64
