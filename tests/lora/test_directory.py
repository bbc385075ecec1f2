"""Adapter directories: PEFT loads what a stage writes, merging gives the same model, and nothing strange is believed."""

import dataclasses
import json
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from keural.errors import UserError
from keural.files import fingerprint, sha256_file, write_json
from keural.lora.directory import CONFIG, WEIGHTS, open_adapter
from keural.lora.layers import write_adapter
from keural.lora.merge import merge, weights_digest
from keural.model import KeuralMoECausalLM
from keural.pretrained.directory import write_model_directory
from keural.pretrained.lineage import LINEAGE, read_record
from keural.pretrained.stored_model import load_model, open_network
from keural.pretrained.weights import state_dict_weights
from keural.recipe import ChatSpec
from keural.train.stage.job import StageResult
from tests.helpers.train_small import VOCAB, random_model, small_job, train_stage

ALL = ["attention", "experts", "router"]


def write_base(directory: Path, dtype: torch.dtype = torch.float32, seed: int = 7) -> Path:
    model = random_model(seed=seed, scale=3.0).to(dtype)
    weights = state_dict_weights({name: value for name, value in model.state_dict().items() if name != "lm_head.weight"})
    return write_model_directory(directory, model.config, weights, None, {"objectives": ["next_token"], "chain": ["old"]})


def train(directory: Path, **lora: Any) -> tuple[Path, StageResult, Path]:
    """An adapter, the stage's result and the base."""
    base = write_base(directory / "base")
    settings = {"lora": {"rank": 4, "alpha": 8, "targets": ALL, **lora}, "train": {"lr": 2e-2, "steps": 6, "save_every": None}}
    job = dataclasses.replace(small_job(directory, "sft", **settings), init=base)
    result = train_stage(job)
    assert result.adapter is not None
    lineage = {"recipe": "tiny", "stage": "chat", "chain": ["old", "chat"], "objectives": ["next_token", "sft"]}
    return write_adapter(directory / "adapter", result.adapter, lineage, ChatSpec()), result, base


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StageResult, Path]:
    return train(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def adapter(trained: tuple[Path, StageResult, Path], tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(trained[0], tmp_path / "adapter"))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(2))
    found: torch.Tensor = model.eval()(input_ids=ids).logits
    return found


def by_peft(adapter: Path, base: Path) -> Any:
    with warnings.catch_warnings(action="ignore"):
        model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True)
        return peft.PeftModel.from_pretrained(model, adapter)


def test_peft_loads_it_over_the_base_and_gives_the_same_logits(trained: tuple[Path, StageResult, Path]) -> None:
    adapter, result, base = trained
    expected = logits(result.model)
    found = by_peft(adapter, base)
    assert (logits(found) - expected).abs().max() <= 1e-6
    assert (logits(load_model(base)) - expected).abs().max() > 1e-2, "the adapter does something"


@pytest.mark.parametrize("targets", [ALL, ["attention"], ["experts"], ["router"]])
def test_merged_it_gives_the_same_logits_and_is_what_peft_merges(tmp_path: Path, targets: list[str]) -> None:
    adapter, result, base = train(tmp_path, targets=targets)
    merge(adapter, tmp_path / "merged")
    found = load_model(tmp_path / "merged")
    torch.testing.assert_close(logits(found), logits(result.model), atol=1e-5, rtol=0)
    theirs = by_peft(adapter, base).merge_and_unload().state_dict()
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, theirs[name], atol=1e-6, rtol=0)


def test_a_merged_model_knows_where_it_comes_from(trained: tuple[Path, StageResult, Path], tmp_path: Path) -> None:
    adapter, _, base = trained
    merge(adapter, tmp_path / "merged")
    record = read_record(tmp_path / "merged")
    assert record["objectives"] == ["next_token", "sft"]
    assert record["chain"] == ["old", "chat"]
    assert record["adapter"]["base"] == weights_digest(open_network(base).weights)
    assert set(record["files"]) >= {"config.json", "model.safetensors"}


def test_merged_into_bfloat16_each_tensor_is_rounded_once(trained: tuple[Path, StageResult, Path], tmp_path: Path) -> None:
    merge(trained[0], tmp_path / "wide")
    merge(trained[0], tmp_path / "narrow", dtype=torch.bfloat16)
    wide, narrow = (open_network(tmp_path / name).weights for name in ("wide", "narrow"))
    assert all(torch.equal(narrow.read(name), wide.read(name).to(torch.bfloat16)) for name in wide.infos)


def test_a_base_in_bfloat16_keeps_all_of_the_adapter(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", torch.bfloat16)
    settings = {"lora": {"rank": 4, "alpha": 8, "targets": ALL}, "train": {"steps": 3, "save_every": None}}
    result = train_stage(dataclasses.replace(small_job(tmp_path, "sft", **settings), init=base))
    assert result.adapter is not None
    adapter = write_adapter(tmp_path / "adapter", result.adapter, {}, ChatSpec())
    merge(adapter, tmp_path / "merged")
    torch.testing.assert_close(logits(load_model(tmp_path / "merged")), logits(result.model), atol=1e-5, rtol=0)


def test_the_base_is_found_wherever_its_tensors_lie_and_no_other_is_taken(
    trained: tuple[Path, StageResult, Path], tmp_path: Path
) -> None:
    adapter, _, base = trained
    stored = open_network(base)
    write_model_directory(tmp_path / "sharded", stored.config, stored.weights, None, {}, shard_bytes=20_000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    merge(adapter, tmp_path / "merged", tmp_path / "sharded")
    other = write_base(tmp_path / "other", seed=8)
    with pytest.raises(UserError, match=r"is not the model that .* was trained on"):
        merge(adapter, tmp_path / "new", other)
    assert not (tmp_path / "new").exists()


def test_an_adapter_of_peft_itself_is_merged_with_a_notice(tmp_path: Path) -> None:
    """Of some of the projections and one of the experts' parameters, in PEFT's own directory without a record."""
    base = write_base(tmp_path / "base")
    model: Any = load_model(base)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "o_proj"], target_parameters=["mlp.experts.down_proj"], init_lora_weights=False
    )
    with warnings.catch_warnings(action="ignore"):
        wrapped = peft.get_peft_model(model, config)
        expected = logits(wrapped)
        wrapped.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    said: list[str] = []
    with pytest.raises(UserError, match="--base"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    merge(tmp_path / "adapter", tmp_path / "merged", base, say=said.append)
    torch.testing.assert_close(logits(load_model(tmp_path / "merged")), expected, atol=1e-5, rtol=1e-5)
    assert any("could not be verified" in line for line in said)
    assert read_record(tmp_path / "merged")["objectives"] == ["next_token", "unknown"]


def rewritten(adapter: Path) -> None:
    """Let the record list the files as they are now, as a forger would."""
    record = json.loads((adapter / LINEAGE).read_text())
    record["files"] = {file.name: sha256_file(file) for file in adapter.iterdir() if file.name != LINEAGE}
    record.pop("checksum")
    write_json(adapter / LINEAGE, {**record, "checksum": fingerprint(record)})


def configured(**changes: Any) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        values = json.loads((adapter / CONFIG).read_text()) | changes
        (adapter / CONFIG).write_text(json.dumps(values))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(adapter: Path) -> None:
        from safetensors.torch import load_file, save_file

        values = load_file(adapter / WEIGHTS)
        change(values)
        save_file(values, adapter / WEIGHTS)

    return apply


def recorded(**changes: Any) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        write_json(adapter / LINEAGE, json.loads((adapter / LINEAGE).read_text()) | changes)

    return change


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (configured(peft_type="IA3"), "kind 'IA3'"),
        (configured(peft_type=None), "only LORA"),
        (configured(use_dora=True), "'use_dora' True is not understood"),
        (configured(use_rslora=True), "'use_rslora'"),
        (configured(bias="all"), "'bias'"),
        (configured(rank_pattern={"q_proj": 2}), "'rank_pattern'"),
        (configured(modules_to_save=["lm_head"]), "'modules_to_save'"),
        (configured(fan_in_fan_out=True), "'fan_in_fan_out'"),
        (configured(lora_dropout=float("nan")), "not JSON|dropout"),
        (configured(layers_to_transform=[0]), "'layers_to_transform'"),
        (configured(something_new={"a": 1}), "'something_new'"),
        (configured(init_lora_weights="pissa"), "changes the base"),
        (configured(target_modules="all-linear", target_parameters=None), "target_modules 'all-linear'"),
        (configured(target_modules=["q_proj", "lm_head"]), "'lm_head'"),
        (configured(target_modules=[["q_proj"]]), "target_modules"),
        (configured(target_parameters={"a": 1}), "target_parameters"),
        (configured(target_modules=[], target_parameters=None), "names no targets"),
        (configured(target_modules=["q_proj"]), "is none of an adapter"),
        (configured(r=8), "has shape"),
        (configured(r=True), "r must be a whole number"),
        (configured(r=0), "r must be a whole number"),
        (configured(r=10**30), "r must be a whole number"),
        (configured(r="4"), "r must be a whole number"),
        (configured(lora_alpha=-1), "lora_alpha must be"),
        (configured(lora_alpha=None), "lora_alpha must be"),
        (configured(lora_alpha=1e300), "lora_alpha must be"),
        (tensors(lambda values: values.pop(FIRST)), "is missing"),
        (tensors(lambda values: values.update({"evil": torch.zeros(2)})), "tensor 'evil'"),
        (tensors(lambda values: values.update({FIRST: torch.zeros(3, 3)})), "has shape"),
        (tensors(lambda values: values[FIRST].fill_(float("nan"))), "not finite"),
        (tensors(lambda values: values.update({FIRST: values[FIRST].to(torch.int8)})), "only F32"),
        (lambda adapter: (adapter / WEIGHTS).write_bytes(b"rubbish"), "damaged"),
        (lambda adapter: (adapter / WEIGHTS).write_bytes(struct.pack("<Q", 10**18)), "damaged"),
        (lambda adapter: (adapter / WEIGHTS).rename(adapter / "adapter_model.bin"), "safetensors alone"),
        (lambda adapter: (adapter / WEIGHTS).unlink(), "no such file"),
        (lambda adapter: (adapter / CONFIG).write_text("[]"), "not a JSON object"),
        (lambda adapter: (adapter / CONFIG).write_text("{" * 100_000), "JSON"),
        (lambda adapter: (adapter / CONFIG).unlink(), "not an adapter"),
        (tensors(lambda values: [values[FIRST.replace("_A", side)].fill_(3e38) for side in ("_A", "_B")]), "not finite"),
        (recorded(adapter=None), "names no base of an adapter"),
        (recorded(adapter=[1]), "names no base of an adapter"),
        (recorded(adapter={"base": 7}), "names no base of an adapter"),
        (recorded(adapter={"base": "0" * 64}), "is not the model that"),
    ],
)
def test_rubbish_is_one_line(adapter: Path, trained: tuple[Path, StageResult, Path], change: Any, reason: str) -> None:
    change(adapter)
    rewritten(adapter)
    with pytest.raises(UserError, match=reason) as error:
        merge(adapter, adapter.with_name("new"), trained[2])
    assert "\n" not in str(error.value)
    assert not adapter.with_name("new").exists()


@pytest.mark.parametrize("where", ["\0", "x" * 10_000, "hub/name", 7, None, ["a"], "\ud800"])
def test_a_base_at_no_place_asks_for_one(adapter: Path, where: Any) -> None:
    configured(base_model_name_or_path=where)(adapter)
    rewritten(adapter)
    with pytest.raises(UserError, match="name it with --base"):
        merge(adapter, adapter.with_name("new"))


def test_a_merged_record_holds_nothing_but_what_is_known(adapter: Path, trained: tuple[Path, StageResult, Path]) -> None:
    recorded(evil="x" * 1000)(adapter)
    rewritten(adapter)
    merge(adapter, adapter.with_name("new"))
    assert "evil" not in read_record(adapter.with_name("new"))


def test_what_was_changed_since_it_was_written_is_known(adapter: Path, trained: tuple[Path, StageResult, Path]) -> None:
    configured(lora_alpha=9)(adapter)
    with pytest.raises(UserError, match="does not match its checksum"):
        open_adapter(adapter)


def test_writing_twice_gives_the_same_bytes(trained: tuple[Path, StageResult, Path], tmp_path: Path) -> None:
    adapter, result, _ = trained
    assert result.adapter is not None
    again = write_adapter(tmp_path / "again", result.adapter, {}, ChatSpec())
    for name in (CONFIG, WEIGHTS, "README.md"):
        assert (again / name).read_bytes() == (adapter / name).read_bytes()


def test_the_network_code_carried_along_is_not_needed(trained: tuple[Path, StageResult, Path]) -> None:
    """A model of this package's own class takes the adapter, too."""
    adapter, result, base = trained
    model = load_model(base)
    assert isinstance(model, KeuralMoECausalLM)
    with warnings.catch_warnings(action="ignore"):
        wrapped = peft.PeftModel.from_pretrained(model, adapter)
    assert (logits(wrapped) - logits(result.model)).abs().max() <= 1e-6
