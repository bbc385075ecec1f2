"""Model directories: what is in them, that they stand alone, that they come back unchanged, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import keural
from keural.errors import UserError
from keural.files import sha256_file
from keural.model import KeuralConfig, KeuralMoECausalLM
from keural.pretrained.directory import save_model_directory, stored_tensors
from keural.pretrained.location import model_directory
from keural.pretrained.stored_model import load_model, load_tokenizer, read_lineage
from keural.recipe import ChatSpec
from keural.tokenizer import KeuralTokenizer, Message, render_prompt

ALONE = """
import json, sys
sys.modules["keural"] = None  # importing it fails from here on, however it is installed
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
directory, request = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
base = AutoModel.from_pretrained(directory, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(directory)
ids = torch.tensor([request["ids"]])
with torch.no_grad():
    logits = model(ids).logits[0]
    hidden = base(ids).last_hidden_state[0]
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": request["content"]}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(**prompt, do_sample=False, repetition_penalty=1.0)
json.dump({
    "logits": logits.tolist(), "hidden": hidden.tolist(), "prompt": prompt["input_ids"][0].tolist(), "output": output[0].tolist(),
    "class": type(model).__name__, "module": type(model).__module__,
}, open(sys.argv[3], "w"))
"""
"""AutoTokenizer asks on the terminal whether the directory's code may run, which a tokenizer does not need: no answer is enough."""


@pytest.fixture
def copy(model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the model directory to damage."""
    return Path(shutil.copytree(model_dir, tmp_path / "copy"))


def stored(directory: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a directory, without its index and checksums noticing."""
    tensors = {name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "keural.json").unlink()


def test_disk_has_one_matrix_per_expert_and_no_head(model_dir: Path, model: KeuralMoECausalLM) -> None:
    shapes = stored(model_dir)

    assert shapes == stored_tensors(model.config)
    assert shapes["model.layers.1.mlp.experts.3.up_proj.weight"] == (24, 32)
    assert not any("gate_up" in name or "lm_head" in name for name in shapes)
    assert len(list(model_dir.glob("model-*.safetensors"))) > 1


def test_expert_matrices_are_the_halves_of_the_fused_tensor(model_dir: Path, model: KeuralMoECausalLM) -> None:
    tensors = {name: tensor for file in model_dir.glob("*.safetensors") for name, tensor in load_file(file).items()}
    fused = model.model.layers[1].mlp.experts.gate_up_proj

    assert torch.equal(tensors["model.layers.1.mlp.experts.2.gate_proj.weight"], fused[2, :24])
    assert torch.equal(tensors["model.layers.1.mlp.experts.2.up_proj.weight"], fused[2, 24:])


def test_loading_restores_every_bit_and_the_tie(model_dir: Path, model: KeuralMoECausalLM) -> None:
    loaded = load_model(model_dir)

    assert not loaded.training
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_config_names_the_classes_that_travel_with_the_weights(model_dir: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())

    assert config["architectures"] == ["KeuralMoECausalLM"]
    assert config["model_type"] == "keural"
    assert config["auto_map"] == {
        "AutoConfig": "configuration_keural.KeuralConfig",
        "AutoModel": "modeling_keural.KeuralMoEModel",
        "AutoModelForCausalLM": "modeling_keural.KeuralMoECausalLM",
    }


def test_generation_defaults_are_the_cards_and_end_at_im_end(model_dir: Path, tokenizer: KeuralTokenizer) -> None:
    settings = json.loads((model_dir / "generation_config.json").read_text())
    del settings["transformers_version"]

    assert settings == {
        "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0, "repetition_penalty": 1.1, "max_new_tokens": 256,
        "eos_token_id": [tokenizer.im_end_id, 2], "pad_token_id": 0, "bos_token_id": 1,
    }  # fmt: skip


def test_temperature_zero_is_saved_as_greedy(tmp_path: Path, model: KeuralMoECausalLM, tokenizer: KeuralTokenizer) -> None:
    out = save_model_directory(tmp_path / "m", model.config, model.state_dict(), tokenizer, {}, ChatSpec(temperature=0.0))

    settings = json.loads((out / "generation_config.json").read_text())
    assert settings["do_sample"] is False
    assert "temperature" not in settings


def test_lineage_keeps_what_was_given_and_checksums(model_dir: Path, tokenizer: KeuralTokenizer) -> None:
    lineage = read_lineage(model_dir)

    assert lineage["chain"] == ["pretrain-1", "sft-1", "dpo-2"]
    assert lineage["tokenizer_sha256"] == tokenizer.sha256
    assert lineage["keural"] == keural.__version__
    assert lineage["chat"]["system"] == "Be brief."
    assert lineage["files"] == {file.name: sha256_file(file) for file in model_dir.iterdir() if file.name != "keural.json"}
    assert {"config.json", "modeling_keural.py", "chat_template.jinja", "tokenizer.json"} < lineage["files"].keys()


def test_saving_twice_gives_the_same_bytes(
    tmp_path: Path, model_dir: Path, model: KeuralMoECausalLM, tokenizer: KeuralTokenizer
) -> None:
    again = save_model_directory(
        tmp_path / "again", load_model(model_dir).config, load_model(model_dir).state_dict(), tokenizer, {}, shard_bytes=30_000
    )

    assert read_lineage(again)["files"] == read_lineage(model_dir)["files"]


def test_state_dict_without_the_tied_head_is_enough(tmp_path: Path, model: KeuralMoECausalLM, tokenizer: KeuralTokenizer) -> None:
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    out = save_model_directory(tmp_path / "m", model.config, weights, tokenizer, {})

    loaded = load_model(out, dtype=None)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.lm_head.weight, weights["model.embed_tokens.weight"])
    assert load_model(out).dtype == torch.float32


def test_directory_stands_alone_in_a_process_without_the_package(
    model_dir: Path, model: KeuralMoECausalLM, tokenizer: KeuralTokenizer, tmp_path: Path
) -> None:
    ids = [1, *tokenizer.encode("the cat 고양이는 sees two blue birds 정원에서 봅니다")]
    content = "안녕하세요 red house"
    request = {"ids": ids, "content": content}
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-I", "-c", ALONE, str(model_dir), json.dumps(request), str(tmp_path / "answer.json")]

    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )

    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert answer["class"] == "KeuralMoECausalLM"
    assert answer["module"].startswith("transformers_modules.")
    with torch.no_grad():
        expected = model(torch.tensor([ids]))
        hidden = model.model(torch.tensor([ids])).last_hidden_state
    torch.testing.assert_close(torch.tensor(answer["logits"]), expected.logits[0])  # the other process may have more threads
    torch.testing.assert_close(torch.tensor(answer["hidden"]), hidden[0])
    assert answer["prompt"] == render_prompt(tokenizer, [Message("user", content)])
    new = answer["output"][len(answer["prompt"]) :]
    assert new == naive_greedy(model, answer["prompt"], {tokenizer.im_end_id, 2}, limit=len(new))
    assert len(new) < 256
    assert new[-1] in {tokenizer.im_end_id, 2}


def naive_greedy(model: KeuralMoECausalLM, ids: list[int], stop: set[int], limit: int) -> list[int]:
    new: list[int] = []
    while len(new) < limit and not (new and new[-1] in stop):
        with torch.no_grad():
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    return new


@pytest.mark.parametrize("given", ["stage", "stage/model", "run", "run/final"])
def test_stage_and_run_directories_stand_for_their_model(model_dir: Path, tmp_path: Path, given: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "stage").symlink_to(model_dir.parent)
    (tmp_path / "run" / "final").symlink_to(model_dir)

    assert model_directory(tmp_path / given) == model_dir.resolve()


def test_saving_refuses_the_tokenizer_of_another_model(
    tmp_path: Path, make_config: Callable[..., KeuralConfig], tokenizer: KeuralTokenizer
) -> None:
    config = make_config(vocab_size=500)
    with pytest.raises(UserError, match=r"vocabulary \(500\) is not the tokenizer's \(402\)"):
        save_model_directory(tmp_path / "m", config, KeuralMoECausalLM(config).state_dict(), tokenizer, {})
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_the_earlier_directory(
    copy: Path, model: KeuralMoECausalLM, tokenizer: KeuralTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    before = sorted(file.name for file in copy.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match="cannot be written"):
            save_model_directory(copy, model.config, model.state_dict(), tokenizer, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert sorted(file.name for file in copy.iterdir()) == before
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]
    load_model(copy)


REFUSED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing": (lambda t: t.pop("model.layers.0.mlp.experts.3.up_proj.weight"), "experts.3.up_proj.weight is missing"),
    "unexpected": (lambda t: t.update({"model.layers.9.x": torch.zeros(2)}), "layers.9.x is not part of the model"),
    "mis-shaped": (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), r"norm.weight has shape \[3\].*asks for \[32\]"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_tensors_must_be_exactly_the_models(copy: Path, kind: str) -> None:
    change, message = REFUSED[kind]
    rewrite(copy, change)

    with pytest.raises(UserError, match=message):
        load_model(copy)


def test_truncated_weights_are_refused(copy: Path) -> None:
    file = sorted(copy.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    (copy / "keural.json").unlink()

    with pytest.raises(UserError, match=f"{file.name}: is damaged"):
        load_model(copy)


def test_one_flipped_bit_is_refused(copy: Path) -> None:
    file = sorted(copy.glob("*.safetensors"))[-1]
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(bytes(data))

    with pytest.raises(UserError, match=f"{file.name}: does not match its checksum"):
        load_model(copy)


def test_missing_shard_is_refused(copy: Path) -> None:
    sorted(copy.glob("*.safetensors"))[1].unlink()
    (copy / "keural.json").unlink()

    with pytest.raises(UserError, match="the weights are incomplete"):
        load_model(copy)


def test_another_architecture_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "mixtral"}))
    (copy / "keural.json").unlink()

    with pytest.raises(UserError, match="describes a 'mixtral' model"):
        load_model(copy)


def test_impossible_config_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 9}))
    (copy / "keural.json").unlink()

    with pytest.raises(UserError, match="num_experts_per_tok"):
        load_model(copy)


def test_tokenizer_of_another_size_is_refused(copy: Path, tmp_path: Path, make_config: Callable[..., KeuralConfig]) -> None:
    config = make_config(vocab_size=500)
    KeuralMoECausalLM(config).save_pretrained(tmp_path / "larger")
    for name in ("tokenizer.model", "tokenizer.json"):
        shutil.copy(copy / name, tmp_path / "larger" / name)

    for load in (load_model, load_tokenizer):
        with pytest.raises(UserError, match="the tokenizer has 402 ids and the model 500"):
            load(tmp_path / "larger")


@pytest.mark.parametrize(("path", "message"), [("nothing", "no such directory"), ("", "not a model directory")])
def test_path_without_a_model_is_refused(tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        model_directory(tmp_path / path)


def test_dangling_final_link_names_its_target(tmp_path: Path) -> None:
    (tmp_path / "final").symlink_to("dpo-2/model")

    with pytest.raises(UserError, match="points to dpo-2/model, which does not exist"):
        model_directory(tmp_path / "final")
