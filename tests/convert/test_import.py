"""Foreign checkpoints: what comes in is what was there, and what is not exactly a Keural model stays out."""

import copy
import json
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from keural.convert.export import ExportOptions, export
from keural.convert.foreign_checkpoint import open_checkpoint
from keural.convert.import_checkpoint import import_checkpoint
from keural.errors import UserError
from keural.files import check_new
from keural.pretrained.stored_model import load_model, load_tokenizer, read_lineage
from keural.recipe import TokenizerSpec
from keural.tokenizer import KeuralTokenizer
from keural.tokenizer.train import train_tokenizer
from tests.conftest import TEXTS
from tests.helpers.published_model import SHAPE, PublishedModel, Tensors, as_safetensors, our_names, training_checkpoint

IDS = torch.randint(4, SHAPE["vocab_size"], (130,), generator=torch.Generator().manual_seed(5))


def quiet(line: str) -> None:
    """What is said is not looked at."""


def saved(state_dict: Tensors, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(training_checkpoint(state_dict), path)
    return path


def prefixed(state_dict: Tensors, prefix: str) -> Tensors:
    return {prefix + name: tensor for name, tensor in state_dict.items()}


def wrapped(state_dict: Tensors) -> Tensors:
    """As FSDP and torch.compile name the tensors of wrapped layers."""
    return {f"_orig_mod.{name.replace('attn.', '_fsdp_wrapped_module.attn.')}": tensor for name, tensor in state_dict.items()}


Maker = Callable[[Path, Tensors], Path]
VARIANTS: dict[str, Maker] = {
    "pt": lambda at, tensors: saved(tensors, at / "checkpoint_5.pt"),
    "pt, FSDP and compile": lambda at, tensors: saved(wrapped(tensors), at / "c.pt"),
    "pt, DDP": lambda at, tensors: saved(prefixed(tensors, "module."), at / "c.pt"),
    "pt, with the tied head": lambda at, tensors: saved(tensors | {"lm_head.weight": tensors["embed_tokens.weight"]}, at / "c.pt"),
    "safetensors": lambda at, tensors: as_safetensors(at / "st", tensors, SHAPE),
    "safetensors, model. prefix": lambda at, tensors: as_safetensors(at / "st", prefixed(tensors, "model."), SHAPE),
    "safetensors, sharded": lambda at, tensors: as_safetensors(at / "st", tensors, SHAPE, shards=3),
    "safetensors, our names": lambda at, tensors: as_safetensors(at / "st", our_names(tensors), SHAPE | {"sliding_window": 9}, 2),
    "safetensors, head too": lambda at, tensors: as_safetensors(
        at / "st", our_names(tensors) | {"lm_head.weight": tensors["embed_tokens.weight"].clone()}, SHAPE | {"sliding_window": 9}
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_gives_the_logits_of_the_independent_model(
    tmp_path: Path, published: PublishedModel, state_dict: Tensors, variant: str
) -> None:
    source = VARIANTS[variant](tmp_path, state_dict)

    out = import_checkpoint(source, tmp_path / "out", say=quiet)

    # In float64: two ways to compute the same in float32 differ by more than 1e-5 on some processors.
    model = load_model(out).double()
    model.set_experts_implementation("eager")  # grouped matrix products know no float64
    with torch.no_grad():
        expected, logits = copy.deepcopy(published).double()(IDS), model(IDS[None]).logits[0]
    assert len(IDS) > 10 * SHAPE["sliding_window"]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_import_then_export_pt_gives_the_identical_tensors(
    tmp_path: Path, state_dict: Tensors, tokenizer: KeuralTokenizer, variant: str, dtype: torch.dtype
) -> None:
    wanted = {name: tensor.to(dtype) for name, tensor in state_dict.items()}
    tokenizer.save(tmp_path / "tokenizer")
    source = VARIANTS[variant](tmp_path, wanted)
    out = import_checkpoint(source, tmp_path / "out", tokenizer=tmp_path / "tokenizer", say=quiet)

    file = export(out, tmp_path / "pt", "pt", ExportOptions())

    again = torch.load(file, weights_only=True)
    assert again["model_config"] == SHAPE | {"router_aux_loss_coef": 0.02, "router_z_loss_coef": 0.001}
    assert again["model"].keys() == wanted.keys()
    assert all(torch.equal(again["model"][name], tensor) for name, tensor in wanted.items())
    assert {tensor.dtype for tensor in again["model"].values()} == {dtype}


def test_progress_and_lineage_come_along(tmp_path: Path, published_pt: Path, tokenizer: KeuralTokenizer) -> None:
    out = import_checkpoint(published_pt, tmp_path / "out", say=quiet)

    assert read_lineage(out)["source"] == {
        "file": "checkpoint_29112.pt", "step": 29112, "epoch": 2, "tokens_processed": 7_631_536_128,
    }  # fmt: skip
    assert load_tokenizer(out).sha256 == tokenizer.sha256


class TestWindow:
    """The published code counts the keys before a token, transformers the token too."""

    def imported(self, tmp_path: Path, tensors: Tensors, config: dict[str, object], **options: int) -> tuple[int | None, str]:
        said: list[str] = []
        source = as_safetensors(tmp_path / "st", tensors, config)
        out = import_checkpoint(source, tmp_path / "out", say=said.append, **options)
        return json.loads((out / "config.json").read_text())["sliding_window"], "\n".join(said)

    @pytest.mark.parametrize("rename", [dict, our_names], ids=["published names", "our names"])
    def test_512_becomes_513_and_the_log_says_so(
        self, tmp_path: Path, state_dict: Tensors, rename: Callable[[Tensors], Tensors]
    ) -> None:
        window, said = self.imported(tmp_path, rename(state_dict), SHAPE | {"sliding_window": 512})

        assert window == 513
        assert "sliding_window: 512 earlier tokens and the token itself, written 513 here" in said

    def test_513_under_our_names_stays(self, tmp_path: Path, state_dict: Tensors) -> None:
        window, said = self.imported(tmp_path, our_names(state_dict), SHAPE | {"sliding_window": 513})

        assert window == 513
        assert "sliding_window" not in said

    def test_what_this_package_wrote_is_taken_at_its_word(self, tmp_path: Path, state_dict: Tensors) -> None:
        first = import_checkpoint(
            as_safetensors(tmp_path / "st", state_dict, SHAPE | {"sliding_window": 511}), tmp_path / "first", say=quiet
        )

        second = import_checkpoint(first, tmp_path / "second", say=quiet)

        assert json.loads((second / "config.json").read_text())["sliding_window"] == 512

    def test_the_command_line_has_the_last_word(self, tmp_path: Path, state_dict: Tensors) -> None:
        assert self.imported(tmp_path, state_dict, SHAPE | {"sliding_window": 512}, sliding_window=40)[0] == 40


def test_vocabulary_grows_by_two_rows_at_the_mean(tmp_path: Path, state_dict: Tensors, tokenizer: KeuralTokenizer) -> None:
    base = state_dict | {"embed_tokens.weight": state_dict["embed_tokens.weight"][:400].clone()}
    source = as_safetensors(tmp_path / "st", base, SHAPE | {"vocab_size": 400})
    tokenizer.save(tmp_path / "tokenizer")

    out = import_checkpoint(source, tmp_path / "out", tokenizer=tmp_path / "tokenizer", grow_vocabulary=True, say=quiet)

    rows = load_model(out).model.embed_tokens.weight
    assert rows.shape == (402, 32)
    assert torch.equal(rows[:400], base["embed_tokens.weight"])
    torch.testing.assert_close(rows[400:], base["embed_tokens.weight"].mean(0).expand(2, -1))
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 401


def test_a_base_model_and_a_tokenizer_with_chatml_are_told_to_grow(
    tmp_path: Path, state_dict: Tensors, tokenizer: KeuralTokenizer
) -> None:
    base = state_dict | {"embed_tokens.weight": state_dict["embed_tokens.weight"][:400].clone()}
    source = as_safetensors(tmp_path / "st", base, SHAPE | {"vocab_size": 400})
    tokenizer.save(tmp_path / "st")

    with pytest.raises(UserError, match="--grow-vocabulary"):
        import_checkpoint(source, tmp_path / "out", say=quiet)


def change(**changes: object) -> dict[str, object]:
    return {**SHAPE, **changes}


EMBEDDING, GATE = "embed_tokens.weight", "layers.1.moe.gate.weight"
REFUSED: dict[str, tuple[Callable[[Tensors], object], dict[str, object], str]] = {
    "missing": (
        lambda t: [t.pop(GATE), t.pop("norm.weight")],
        SHAPE,
        r"2 missing: model.layers.1.mlp.gate.weight, model.norm.weight",
    ),
    "unexpected": (lambda t: t.update({"layers.1.attn.q_norm.weight": torch.ones(8)}), SHAPE, "1 unexpected: .*q_norm.weight"),
    "duplicate": (lambda t: t.update({f"module.{GATE}": t[GATE].clone()}), SHAPE, f"duplicate tensors: {GATE}, module.{GATE}"),
    "mis-shaped": (lambda t: t.update({GATE: torch.zeros(3, 32)}), SHAPE, r"gate.weight \[3, 32\] instead of \[4, 32\]"),
    "head not tied": (lambda t: t.update({"lm_head.weight": t[EMBEDDING] + 1}), SHAPE, "lm_head.weight is not the embedding"),
    "not a number": (lambda t: t[GATE].fill_(torch.nan), SHAPE, "1 tensors with values that are not finite: .*mlp.gate.weight"),
    "infinite": (lambda t: t["norm.weight"][3:].fill_(torch.inf), SHAPE, "not finite: model.norm.weight"),
    "two precisions": (lambda t: t.update({GATE: t[GATE].half()}), SHAPE, "float16 and float32"),
    "integers": (lambda t: t.update({GATE: t[GATE].int()}), SHAPE, "only F32, F16, BF16 can be read"),
    "fewer layers": (lambda t: None, change(num_hidden_layers=3), "unexpected: .*layers.3"),
    "other experts": (lambda t: None, change(num_local_experts=5), "missing: .*experts.4"),
    "other heads": (lambda t: None, change(num_key_value_heads=4), "mis-shaped: .*k_proj"),
    "other vocabulary": (lambda t: None, change(vocab_size=400), r"embed_tokens.weight \[402, 32\] instead of \[400, 32\]"),
    "absurd layers": (lambda t: None, change(num_hidden_layers=10**6), "says num_hidden_layers 1000000, but there are only 78"),
    "absurd width": (lambda t: None, change(hidden_size=10**40), "hidden_size must be at least 1, a whole number and below"),
    "text for a number": (lambda t: None, change(hidden_size="32"), "hidden_size must be .* got '32'"),
    "a vector as embedding": (lambda t: t.update({EMBEDDING: torch.zeros(3)}), SHAPE, r"embed_tokens.weight \[3\] instead of"),
    "impossible": (lambda t: None, change(num_experts_per_tok=9), "num_experts_per_tok"),
    "another architecture": (lambda t: None, change(model_type="mixtral"), "describes a 'mixtral' model"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_what_is_no_keural_model_is_refused_and_leaves_nothing(tmp_path: Path, state_dict: Tensors, kind: str, form: str) -> None:
    damage, config, message = REFUSED[kind]
    damage(state_dict)
    if form == "pt":
        source = tmp_path / "c.pt"
        torch.save(training_checkpoint(state_dict, config), source)
    else:
        source = as_safetensors(tmp_path / "st", state_dict, config)
    before = set(tmp_path.iterdir())

    with pytest.raises(UserError, match=message):
        import_checkpoint(source, tmp_path / "out", say=quiet)

    assert set(tmp_path.iterdir()) == before


def test_without_a_configuration_the_tensors_must_be_the_published_ones(tmp_path: Path, state_dict: Tensors) -> None:
    torch.save(state_dict, tmp_path / "bare.pt")
    (tmp_path / "shape.json").write_text(json.dumps(SHAPE))

    with pytest.raises(UserError, match=r"mis-shaped: .*another configuration: --config"):
        import_checkpoint(tmp_path / "bare.pt", tmp_path / "out", say=quiet)
    import_checkpoint(tmp_path / "bare.pt", tmp_path / "out", config=tmp_path / "shape.json", say=quiet)


class TestDamage:
    """Files that are cut off, changed, or would run code."""

    def test_a_truncated_pt(self, published_pt: Path, tmp_path: Path) -> None:
        for kept in (0, 100, published_pt.stat().st_size // 2, published_pt.stat().st_size - 1):
            cut = tmp_path / f"{kept}.pt"
            cut.write_bytes(published_pt.read_bytes()[:kept])
            with pytest.raises(UserError, match=f"{kept}.pt: not a whole PyTorch checkpoint|{kept}.pt: is damaged"):
                open_checkpoint(cut)

    def test_one_flipped_bit_in_a_pt(self, published_pt: Path, tmp_path: Path) -> None:
        data = bytearray(published_pt.read_bytes())
        data[len(data) // 2] ^= 1
        published_pt.write_bytes(data)

        with pytest.raises(UserError, match="does not match its checksum"):
            import_checkpoint(published_pt, tmp_path / "out", say=quiet)

    def test_a_pickle_with_code_is_refused_and_not_run(self, tmp_path: Path) -> None:
        class Trap:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

        torch.save({"model": {}, "trap": Trap()}, tmp_path / "trap.pt")
        (tmp_path / "plain.pt").write_bytes(pickle.dumps(Trap()))

        with pytest.raises(UserError, match=r"trap.pt: holds objects other than tensors"):
            open_checkpoint(tmp_path / "trap.pt")
        with pytest.raises(UserError, match=r"plain.pt: not a whole PyTorch checkpoint"):
            open_checkpoint(tmp_path / "plain.pt")
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("kind", ["meta", "sparse", "quantized"])
    def test_tensors_without_plain_values(
        self, tmp_path: Path, state_dict: Tensors, kind: str, recwarn: pytest.WarningsRecorder
    ) -> None:
        made = {
            "meta": lambda: torch.zeros(32, device="meta"),
            "sparse": lambda: torch.zeros(32).to_sparse(),
            "quantized": lambda: torch.quantize_per_tensor(torch.zeros(32), 0.1, 0, torch.qint8),
        }
        torch.save(state_dict | {"norm.weight": made[kind]()}, tmp_path / "c.pt")
        recwarn.clear()

        with pytest.raises(UserError, match=r"has a shape but no values|is of type|tensors of unusual types"):
            open_checkpoint(tmp_path / "c.pt")
        assert not recwarn.list

    def test_truncated_safetensors(self, tmp_path: Path, state_dict: Tensors) -> None:
        file = as_safetensors(tmp_path / "st", state_dict, SHAPE) / "model.safetensors"
        for kept in (0, 5, 200, file.stat().st_size - 1):
            cut = tmp_path / "cut.safetensors"
            cut.write_bytes(file.read_bytes()[:kept])
            with pytest.raises(UserError, match=r"cut.safetensors: is damaged"):
                open_checkpoint(cut)

    def test_a_missing_shard(self, tmp_path: Path, state_dict: Tensors) -> None:
        source = as_safetensors(tmp_path / "st", state_dict, SHAPE, shards=3)
        (source / "model-00002-of-00003.safetensors").unlink()

        with pytest.raises(UserError, match=r"00002-of-00003\.safetensors: no such file"):
            open_checkpoint(source)

    @pytest.mark.parametrize("content", ["", "[1]", "{", '{"weight_map": {}}', '{"weight_map": {"a": 3}}'])
    def test_a_broken_index(self, tmp_path: Path, state_dict: Tensors, content: str) -> None:
        source = as_safetensors(tmp_path / "st", state_dict, SHAPE, shards=2)
        (source / "model.safetensors.index.json").write_text(content)

        with pytest.raises(UserError, match=r"index\.json"):
            open_checkpoint(source)

    def test_an_index_cannot_name_files_elsewhere(self, tmp_path: Path, state_dict: Tensors) -> None:
        source = as_safetensors(tmp_path / "st", state_dict, SHAPE)
        index = {"weight_map": {"norm.weight": "../../other.safetensors"}}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))

        with pytest.raises(UserError, match=r"names '\.\./\.\./other.safetensors', which is not a file beside it"):
            open_checkpoint(source)

    @pytest.mark.parametrize(
        ("name", "content"), [("x.pt", b"PK\x05\x06" + bytes(18)), ("x.txt", b"hello"), ("x.safetensors", b"\xff" * 64)]
    )
    def test_rubbish(self, tmp_path: Path, name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(content)

        with pytest.raises(UserError, match=name):
            open_checkpoint(tmp_path / name)

    def test_a_compressed_pt_is_not_read_as_if_it_were_plain(self, tmp_path: Path, published_pt: Path) -> None:
        with zipfile.ZipFile(published_pt) as plain, zipfile.ZipFile(tmp_path / "c.pt", "w", zipfile.ZIP_DEFLATED) as packed:
            for record in plain.infolist():
                packed.writestr(record.filename, plain.read(record))

        with pytest.raises(UserError, match="its records are compressed"):
            open_checkpoint(tmp_path / "c.pt")

    @pytest.mark.parametrize("form", ["pt", "safetensors"])
    def test_a_file_larger_than_the_memory_can_be_opened(self, tmp_path: Path, form: str) -> None:
        """A sparse file stands for it: what counts is that nothing maps it or makes room for it."""
        rows = 2**36
        if form == "safetensors":
            header = json.dumps({"a": {"dtype": "F32", "shape": [rows, 4], "data_offsets": [0, rows * 16]}}).encode()
            with (tmp_path / "big.safetensors").open("wb") as file:
                file.write(len(header).to_bytes(8, "little") + header)
                file.truncate(8 + len(header) + rows * 16)
        else:
            with FakeTensorMode():
                tensors = {"a": torch.empty(rows, 4)}
            with torch.serialization.skip_data(materialize_fake_tensors=True):
                torch.save(tensors, tmp_path / "big.pt")

        opened = open_checkpoint(next(tmp_path.glob("big.*")), verify=False)
        assert opened.weights.infos["a"].shape == (rows, 4)

    def test_directories_without_or_with_several(self, tmp_path: Path, state_dict: Tensors) -> None:
        with pytest.raises(UserError, match="holds no checkpoint"):
            open_checkpoint(tmp_path)
        for number in (1, 2):
            torch.save(state_dict, tmp_path / f"checkpoint_{number}.pt")
        with pytest.raises(UserError, match=r"holds 2 checkpoints \(checkpoint_1.pt, checkpoint_2.pt\); name one"):
            open_checkpoint(tmp_path)


class TestOutput:
    """What is written is whole or not there."""

    def test_a_directory_with_something_in_it_is_left_alone(self, tmp_path: Path, published_pt: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("keep")

        with pytest.raises(UserError, match="exists and is not empty"):
            import_checkpoint(published_pt, tmp_path / "out", say=quiet)
        assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]

    def test_too_little_disk_is_said_before_anything_is_written(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"out: needs 1000000000.00 GB, .* are free there"):
            check_new(tmp_path / "a" / "out", needed=10**18)
        assert list(tmp_path.iterdir()) == []

    def test_a_disk_that_fills_up_leaves_nothing(self, tmp_path: Path, published_pt: Path) -> None:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        try:
            with pytest.raises(UserError, match="out: cannot be written"):
                import_checkpoint(published_pt, tmp_path / "out", say=quiet)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_one_line_and_exit_code_2(tmp_path: Path, keural: Callable[..., tuple[int, str, str]]) -> None:
    for arguments in (["import", tmp_path / "no", tmp_path / "out"], ["export", tmp_path, tmp_path / "out", "--format", "hf"]):
        code, out, err = keural(*arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("keural: error: ")


MEASURE = """
import resource, sys
from pathlib import Path
from keural.convert.import_checkpoint import import_checkpoint
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
import_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_memory_is_that_of_a_tensor_not_of_the_model(tmp_path: Path, form: str) -> None:
    shape = SHAPE | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 8192}
    state_dict = {name: tensor.bfloat16() for name, tensor in PublishedModel(shape).state_dict().items()}
    size = sum(tensor.nbytes for tensor in state_dict.values())
    source = saved(state_dict, tmp_path / "c.pt") if form == "pt" else as_safetensors(tmp_path / "st", state_dict, shape)
    if form == "pt":
        torch.save(training_checkpoint(state_dict, shape), source)

    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "out")], capture_output=True, text=True, check=True
    )

    grown = int(done.stdout.splitlines()[-1]) * 1024
    assert size > 300_000_000
    assert grown < size / 3


def test_another_tokenizer_of_the_same_size_than_the_record_names_is_refused(
    tmp_path: Path, model_dir: Path, tokenizer: KeuralTokenizer
) -> None:
    spec = TokenizerSpec.model_validate({"vocab_size": 400, "sources": [{"name": "words", "adapter": "text"}]})
    other = train_tokenizer((text[::-1] for text in TEXTS), spec, tmp_path / "other", seed=0)
    assert other.vocab_size == tokenizer.vocab_size

    with pytest.raises(UserError, match=r"is another tokenizer .* though of the same size"):
        import_checkpoint(model_dir, tmp_path / "out", tokenizer=tmp_path / "other", say=quiet)
    assert not (tmp_path / "out").exists()
    out = import_checkpoint(model_dir, tmp_path / "out", tokenizer=tmp_path / "other", verify=False, say=quiet)
    assert load_tokenizer(out).sha256 == other.sha256
