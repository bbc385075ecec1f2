"""A safetensors file that is damaged, or made to hurt: one line, exit code 2, and no tensor read from a wrong place."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from keural.errors import UserError
from keural.pretrained.safetensors import open_safetensors, read_header, write_shards
from keural.pretrained.weights import state_dict_weights

Keural = Callable[..., tuple[int, str, str]]

A = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
B = {"dtype": "F32", "shape": [4], "data_offsets": [16, 32]}
VALUES = bytes(range(32))


def written(header: str | bytes | dict[str, Any], values: bytes = VALUES, length: int | None = None) -> bytes:
    """A file with this header, whose length says what it is unless another one is given."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + values


def raw(tensor: torch.Tensor) -> bytes:
    """The values of a tensor as they lie in a file."""
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def entry(**changes: Any) -> bytes:
    """A file of two tensors, the second one's entry changed."""
    return written({"a": A, "b": B | changes})


DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the header is longer than the file"),
    "seven bytes": (b"1234567", "the header is longer than the file"),
    "no header": (written("", b"", 0), "Expecting value"),
    "a length beyond the file": (written({"a": A, "b": B}, length=10**6), "the header is longer than the file"),
    "a length of 2^63": (written({"a": A, "b": B}, length=2**63), "the header is longer than the file"),
    "a length too short": (written({"a": A, "b": B}, length=20), "is damaged"),
    "no JSON": (written("{" * 40), "is damaged"),
    "no UTF-8": (written(b'{"\xff": 1}'), "is damaged"),
    "deeply nested": (written("[" * 5000 + "]" * 5000), "nested deeper than"),
    "a number of 5,000 digits": (
        written('{"a": {"dtype": "F32", "shape": [' + "9" * 5000 + '], "data_offsets": [0, 4]}}'),
        "too many digits",
    ),
    "a list": (written("[]"), "the header is no JSON object"),
    "NaN": (written('{"a": NaN}'), "the entry of 'a' is not understood"),
    "an entry that is text": (written({"a": "x", "b": B}), "the entry of 'a' is not understood"),
    "an entry without offsets": (written({"a": {"dtype": "F32", "shape": [2]}}), "the entry of 'a' is not understood"),
    "a key twice": (
        written('{"a": ' + json.dumps(A) + ', "a": ' + json.dumps(A) + ', "b": ' + json.dumps(B) + "}"),
        "key 'a' is given twice",
    ),
    "a shape twice": (
        written('{"a": {"dtype": "F32", "shape": [4], "shape": [2, 2], "data_offsets": [0, 16]}, "b": ' + json.dumps(B) + "}"),
        "key 'shape' is given twice",
    ),
    "a negative size": (entry(shape=[-4]), "the entry of 'b' is not understood"),
    "two negative sizes": (entry(shape=[-2, -2]), "the entry of 'b' is not understood"),
    "negative offsets": (entry(data_offsets=[-16, 0]), "the entry of 'b' is not understood"),
    "offsets turned round": (entry(data_offsets=[32, 16]), "'b' has -16 bytes"),
    "a truth value as a size": (entry(shape=[4, True]), "the entry of 'b' is not understood"),
    "sizes with a fraction": (entry(shape=[4.0]), "the entry of 'b' is not understood"),
    "three offsets": (entry(data_offsets=[16, 20, 32]), "the entry of 'b' is not understood"),
    "overlapping": (entry(data_offsets=[8, 24]), "the values of 'b' do not begin where the ones before end"),
    "the same place twice": (entry(data_offsets=[0, 16]), "the values of 'b' do not begin where the ones before end"),
    "a gap": (written({"a": A, "b": B | {"data_offsets": [20, 36]}}, VALUES + b"1234"), "do not begin where the ones before end"),
    "another size than the shape": (entry(shape=[5]), "'b' has 16 bytes, its shape [5] wants 20"),
    "a shape beyond every memory": (entry(shape=[2**40, 2**40]), "'b' has 16 bytes"),
    "values cut off": (written({"a": A, "b": B}, VALUES[:-1]), "bytes instead of"),
    "values left over": (written({"a": A, "b": B}, VALUES + b"x"), "bytes instead of"),
    "an unknown type": (entry(dtype="F8_E4M3"), "tensor 'b' is of type 'F8_E4M3'; only F32, F16, BF16 can be read"),
    "a type that is a list": (entry(dtype=["F32"]), "tensor 'b' is of type ['F32']"),
    "a type that is missing": (written({"a": {"shape": [2, 2], "data_offsets": [0, 16]}}), "tensor 'a' is of type None"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_one_line(tmp_path: Path, keural: Keural, damage: str) -> None:
    content, message = DAMAGED[damage]
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)

    with pytest.raises(UserError) as refusal:
        open_safetensors([file])
    assert message in str(refusal.value)

    for command in (["inspect", file], ["import", file, tmp_path / "out"]):
        code, said, err = keural(*command)
        assert (code, said, err.count("\n")) == (2, "", 1), (command, err)
        assert "model.safetensors: is damaged" in err
    assert not (tmp_path / "out").exists()


def test_the_header_of_these_tests_is_a_good_one(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(written({"__metadata__": {"format": "pt"}, "a": A, "b": B}))

    ours = open_safetensors([tmp_path / "x.safetensors"])

    theirs = load_file(tmp_path / "x.safetensors")
    assert {name: tensor.numpy().tobytes() for name, tensor in ours} == {n: t.numpy().tobytes() for n, t in theirs.items()}


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    """The format ends at 100 MB; a sparse file of more is refused before a byte of its header is read."""
    file = tmp_path / "x.safetensors"
    with file.open("wb") as stream:
        stream.write((150_000_000).to_bytes(8, "little"))
        stream.truncate(200_000_000)

    with pytest.raises(ValueError, match="the header is longer"):
        read_header(file)


@pytest.mark.parametrize("name", ["\x1b[31mred", "a" * 5000, "zeile\nzwei", "\u202eevil"])
def test_names_reach_no_terminal_raw(tmp_path: Path, keural: Keural, name: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(written({name: A | {"dtype": "F64"}}, VALUES[:16]))

    code, _, err = keural("inspect", tmp_path / "model.safetensors")

    assert (code, err.count("\n")) == (2, 1)
    assert "\x1b" not in err
    assert "\u202e" not in err
    assert len(err) < 1500


ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F64", 3]),
        "shape": st.lists(st.sampled_from([0, 1, 2, 4, -1, True, 2**70]), max_size=2),
        "data_offsets": st.lists(st.sampled_from([0, 4, 8, 16, 32, -4, 2**70]), min_size=1, max_size=3),
    }
)
HEADERS = st.dictionaries(st.sampled_from(["a", "b", "c"]), st.sampled_from([A, B, None, "x", 1.5]) | ENTRY, max_size=3)


@given(HEADERS, st.sampled_from([VALUES, VALUES[:16], b"", VALUES + b"1234"]))
def test_whatever_the_header_says_is_read_as_the_library_reads_it_or_refused(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], values: bytes
) -> None:
    file = tmp_path_factory.mktemp("any") / "x.safetensors"
    file.write_bytes(written(header, values))

    try:
        ours = {name: raw(tensor) for name, tensor in open_safetensors([file])}
    except UserError:
        return
    assert ours == {name: raw(tensor) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("shard_bytes", [1, 100, 10**9])
def test_what_is_written_is_what_the_library_writes(tmp_path: Path, shard_bytes: int) -> None:
    tensors = {f"t{number}": torch.randn(number, 3) for number in range(1, 6)}
    write_shards(tmp_path, state_dict_weights(tensors), shard_bytes)

    found = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}

    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    save_file(tensors, tmp_path / "theirs.safetensors")
    assert {name: info for name, (info, _) in read_header(tmp_path / "theirs.safetensors").items()}.keys() == tensors.keys()
