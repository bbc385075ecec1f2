"""The proof at load: done where there is a doubt, refusing a model that forgets, remembered only as it was written."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers.cache_utils import Cache

from keural import releases
from keural.errors import UserError
from keural.evaluate.bench import _trained
from keural.files import fingerprint
from keural.pretrained import cached_step
from keural.pretrained.cached_step import cached_step_difference, check_cached_step
from keural.pretrained.lineage import list_again
from keural.pretrained.network_code import NETWORK_CODE
from keural.pretrained.stored_model import load_model
from keural.serve.engines.transformers import TransformersEngine


@pytest.fixture(autouse=True)
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed transformers is newer than the newest tested."""
    monkeypatch.setitem(releases.TESTED, "transformers", ("5.0.0", "5.1.0"))


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each comparison that is made."""
    made: list[int] = []

    def counting(*arguments: object) -> float | None:
        made.append(1)
        return cached_step_difference(*arguments)

    monkeypatch.setattr(cached_step, "cached_step_difference", counting)
    return made


@pytest.fixture(params=["the past is lost", "the past is doubled", "a position too late", "the cache is not returned"])
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What another release could do to our forward pass."""
    update, length = Cache.update, Cache.get_seq_length
    changes = {
        "the past is lost": ("update", lambda self, key, value, *rest, **named: (key, value)),
        "the past is doubled": (
            "update",
            lambda self, key, value, *rest, **named: tuple(
                torch.cat((state[:, :, :1], state), dim=2)[:, :, : state.shape[2]] for state in update(self, key, value, *rest)
            ),
        ),
        "a position too late": ("get_seq_length", lambda self, *rest: length(self, *rest) + 1),
    }
    if request.param in changes:
        monkeypatch.setattr(Cache, *changes[request.param])
    else:
        monkeypatch.setattr("keural.model.modeling_keural.CACHE_NAME", "layers")
    return str(request.param)


def test_tested_releases_and_our_own_code_are_believed(model_dir: Path, proofs: list[int], user_cache: Path) -> None:
    TransformersEngine(model_dir, device="cpu")

    assert proofs == []
    assert not user_cache.exists()


@pytest.mark.usefixtures("newer")
def test_a_newer_release_is_proved_once(model_dir: Path, proofs: list[int]) -> None:
    for _ in range(2):
        TransformersEngine(model_dir, device="cpu")

    assert len(proofs) == 1


@pytest.mark.parametrize("library", ["torch", "transformers"])
@pytest.mark.parametrize("tested", [("0.1",), ("99.0",)], ids=["newer", "older"])
def test_each_library_outside_its_range_is_a_doubt(
    model_dir: Path, proofs: list[int], monkeypatch: pytest.MonkeyPatch, library: str, tested: tuple[str, ...]
) -> None:
    monkeypatch.setitem(releases.TESTED, library, tested)

    TransformersEngine(model_dir, device="cpu")

    assert len(proofs) == 1


def test_other_code_in_the_directory_is_a_doubt(model_dir: Path, tmp_path: Path, proofs: list[int]) -> None:
    copy = Path(shutil.copytree(model_dir, tmp_path / "copy"))
    (copy / NETWORK_CODE[1]).write_text("# an earlier one\n", encoding="utf-8")
    list_again(copy, NETWORK_CODE)

    TransformersEngine(copy, device="cpu")

    assert len(proofs) == 1


@pytest.mark.usefixtures("newer", "broken")
def test_a_network_that_forgets_is_refused_with_the_reason(model_dir: Path) -> None:
    with pytest.raises(UserError, match=r"would generate wrong text here: .*transformers [\d.]+ is newer than 5.1.0.*pip install"):
        TransformersEngine(model_dir, device="cpu")


@pytest.mark.usefixtures("newer")
def test_a_refusal_is_not_remembered(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as breaking:
        breaking.setattr(Cache, "update", lambda self, key, value, *rest, **named: (key, value))
        with pytest.raises(UserError, match="differ by"):
            TransformersEngine(model_dir, device="cpu")

    TransformersEngine(model_dir, device="cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_far_below_what_is_tolerated_and_a_lost_cache_far_above(
    model_dir: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(model_dir, dtype)
    model.set_experts_implementation("eager")
    tolerance = cached_step.TOLERANCE.get(dtype, cached_step.HALF_TOLERANCE)
    right = [cached_step_difference(model, number) for number in range(10)]
    monkeypatch.setattr(Cache, "update", lambda self, key, value, *rest, **named: (key, value))
    wrong = [cached_step_difference(model, number) for number in range(10)]

    assert sorted(right)[5] < tolerance / 3
    assert min(wrong) > tolerance * 3


@pytest.mark.usefixtures("newer")
def test_a_proof_holds_for_its_device_and_precision_alone(model_dir: Path, proofs: list[int]) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        TransformersEngine(model_dir, dtype, device="cpu")

    assert len(proofs) == 2


@pytest.mark.usefixtures("newer")
@pytest.mark.parametrize("spoilt", [b"", b"\xff", b"null", b"[]", b"{}", b'"yes"', b"[" * 100_000, b'{"dtype": "torch.float32"}'])
def test_what_is_not_well_formed_is_not_believed(model_dir: Path, proofs: list[int], user_cache: Path, spoilt: bytes) -> None:
    TransformersEngine(model_dir, device="cpu")
    (file,) = (user_cache / "keural" / "cached-step").iterdir()
    whole = file.read_bytes()
    file.write_bytes(spoilt)

    TransformersEngine(model_dir, device="cpu")

    assert len(proofs) == 2
    assert file.read_bytes() == whole


@pytest.mark.usefixtures("newer")
def test_a_proof_of_other_code_is_not_believed(model_dir: Path, proofs: list[int], user_cache: Path) -> None:
    TransformersEngine(model_dir, device="cpu")
    (file,) = (user_cache / "keural" / "cached-step").iterdir()
    claim = json.loads(file.read_text(encoding="utf-8"))
    assert file.stem == fingerprint(claim)[:32]
    file.write_text(json.dumps({**claim, "code": "0" * 64}), encoding="utf-8")

    TransformersEngine(model_dir, device="cpu")

    assert len(proofs) == 2


@pytest.mark.usefixtures("newer")
@pytest.mark.parametrize("place", ["a file", "a file in place of the directory", "no home"])
def test_a_cache_that_cannot_be_written_is_no_error(
    model_dir: Path, tmp_path: Path, proofs: list[int], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    if place == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    else:
        blocked = tmp_path / "blocked"
        blocked.mkdir()
        (blocked / "keural" if place == "a file" else tmp_path / "cache").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(blocked if place == "a file" else tmp_path / "cache"))

    for _ in range(2):
        TransformersEngine(model_dir, device="cpu")

    assert len(proofs) == 2


def test_a_relative_cache_home_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the XDG specification wants it."""
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path))

    assert cached_step._file({"a": "b"}).parent == tmp_path / ".cache" / "keural" / "cached-step"


def test_logits_that_are_not_finite_are_no_matter_of_the_cache(model_dir: Path) -> None:
    model = load_model(model_dir)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)

    assert cached_step_difference(model) is None


def test_evaluation_proves_what_it_generates_with(model_dir: Path, proofs: list[int], newer: None) -> None:
    _trained(model_dir)

    assert len(proofs) == 1


INSTALLED = {
    "5.24.1": 1, "5.25.0.dev0": 1, "6.0.0": 1, "5.16.1": 1,
    "5.24.0": 0, "5.24.0+local": 0, "5.20.2": 0, "5.17.0": 0,
}  # fmt: skip


@pytest.mark.parametrize(("installed", "doubts"), INSTALLED.items())
def test_a_patch_release_is_newer_and_another_build_is_not(monkeypatch: pytest.MonkeyPatch, installed: str, doubts: int) -> None:
    monkeypatch.setattr(releases, "version", {"transformers": installed, "torch": "2.13.0+cpu"}.__getitem__)

    assert len(releases.outside_tested()) == doubts


def test_check_does_nothing_without_a_doubt_even_to_a_broken_network(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what it costs is paid only where there is one."""
    model = load_model(model_dir)
    monkeypatch.setattr(model, "forward", lambda **_: pytest.fail("computed"))

    check_cached_step(model, model_dir)
