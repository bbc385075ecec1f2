"""Model directories in the Hugging Face layout: what a stage leaves behind and every later command takes.

In: a configuration, a state dict with fused experts, a tokenizer. Out: a directory that `AutoModelForCausalLM` and `AutoTokenizer`
load without this package (`trust_remote_code=True`), and back, strictly: a tensor that is missing, left over, mis-shaped or damaged
is refused with one line.

    config.json  generation_config.json  model*.safetensors (one matrix per expert, no head)  configuration_keural.py
    modeling_keural.py  tokenizer.model  tokenizer.json  tokenizer_config.json  chat_template.jinja  keural.json (lineage)
"""

import contextlib
import copy
import logging
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

import keural.model
from keural.errors import UserError
from keural.files import atomic_directory, read_json, sha256_file, write_json
from keural.model import KeuralConfig, KeuralMoECausalLM
from keural.recipe import ChatSpec
from keural.tokenizer import KeuralTokenizer

LINEAGE = "keural.json"
INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MODEL_CODE = ("configuration_keural.py", "modeling_keural.py")
AUTO_MAP = {
    "AutoConfig": "configuration_keural.KeuralConfig",
    "AutoModel": "modeling_keural.KeuralMoEModel",
    "AutoModelForCausalLM": "modeling_keural.KeuralMoECausalLM",
}
HEAD = "lm_head.weight"
DEFAULT_SHARD_BYTES = 5_000_000_000


def save_model_directory(
    out: Path,
    config: KeuralConfig,
    state_dict: Mapping[str, Tensor],
    tokenizer: KeuralTokenizer,
    lineage: Mapping[str, Any],
    chat: ChatSpec | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Path:
    """Write a complete model directory, atomically: `out` appears whole or not at all, and replaces an earlier one.

    Args:
        out: the directory to write.
        config: shape of the network; its `vocab_size` must be the tokenizer's.
        state_dict: of a `KeuralMoECausalLM`, experts fused, on any device; the tied head may be left out. Stored in its dtype.
        tokenizer: saved next to the weights.
        lineage: where the weights come from (recipe, stage, fingerprints), kept in `keural.json` beside checksums and versions.
        chat: sampling defaults and system message of the model's chats; None stands for the card's.
        shard_bytes: upper bound of one weight file, unless a single tensor is larger.

    Returns:
        `out`.

    Raises:
        UserError: when the vocabularies differ or the disk refuses a write.
    """
    if config.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"{out}: the model's vocabulary ({config.vocab_size}) is not the tokenizer's ({tokenizer.vocab_size}); use the "
            "tokenizer the model was trained with, or grow the vocabulary first"
        )
    chat = chat or ChatSpec()
    model = _assemble(config, state_dict)
    model.generation_config = _generation_config(tokenizer, chat)
    with _writing(out), _quiet_transformers(), atomic_directory(out) as directory:
        model.save_pretrained(directory, max_shard_size=shard_bytes)
        for name in MODEL_CODE:
            shutil.copyfile(Path(keural.model.__path__[0]) / name, directory / name)
        tokenizer.save(directory)
        write_json(directory / LINEAGE, _lineage(directory, lineage, tokenizer, chat))
    return out


def load_model(path: Path, dtype: torch.dtype | None = torch.float32, *, verify: bool = True) -> KeuralMoECausalLM:
    """Load a model directory strictly, on the CPU and in evaluation mode.

    Args:
        path: a model directory, a stage directory or a run directory (see `model_directory`).
        dtype: precision in memory; None keeps the stored one.
        verify: compare the files with the checksums in `keural.json`, where there is one.

    Raises:
        UserError: for anything that is not exactly a Keural model whose tokenizer fits: another architecture, a tensor that is
            missing, left over or mis-shaped, a damaged file, a tokenizer of another size.
    """
    directory = model_directory(path)
    config = _read_config(directory)
    _check_tensors(directory, config)
    if verify:
        check_sums(directory)
    if (directory / "tokenizer.model").is_file():
        load_tokenizer(directory)
    try:
        with _quiet_transformers():
            model, info = KeuralMoECausalLM.from_pretrained(
                directory, config=config, dtype=dtype or "auto", local_files_only=True, output_loading_info=True
            )
    except (OSError, SafetensorError) as error:
        raise UserError(f"{directory}: the weights cannot be read ({error}); copy or train the model again") from error
    assert not any(info.values()), f"transformers did not take every tensor: {info}"
    return model.eval()


def load_tokenizer(path: Path) -> KeuralTokenizer:
    """The tokenizer of a model directory. Raises `UserError` when it is missing or its vocabulary is not the model's."""
    directory = model_directory(path)
    tokenizer = KeuralTokenizer.load(directory)
    vocab_size = _read_config(directory).vocab_size
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} ids and the model {vocab_size}; "
            "put the tokenizer there that the model was trained with"
        )
    return tokenizer


def model_directory(path: Path) -> Path:
    """The model directory that `path` stands for: itself, the `model` of a stage, or the `final` of a run; links resolved.

    Raises `UserError` when there is none.
    """
    for candidate in (path, path / "model", path / "final"):
        if (candidate / "config.json").is_file():
            return candidate.resolve()
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path}: points to {path.readlink()}, which does not exist; run the stage that makes it")
    if not path.exists():
        raise UserError(f"{path}: no such directory; give a model directory, e.g. runs/toy/final")
    raise UserError(f"{path}: is not a model directory (no config.json); give one such as runs/toy/final")


def read_lineage(path: Path) -> dict[str, Any]:
    """What `keural.json` says of a model directory; empty where there is none."""
    file = model_directory(path) / LINEAGE
    return dict(read_json(file)) if file.is_file() else {}


def stored_tensors(config: KeuralConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a model directory: one matrix per expert, a head only where it is not tied."""
    with torch.device("meta"):
        fused = KeuralMoECausalLM(config).state_dict()
    stored: dict[str, tuple[int, ...]] = {}
    for name, tensor in fused.items():
        block, _, kind = name.rpartition(".")
        if name == HEAD and config.tie_word_embeddings:
            continue
        if kind in {"gate_up_proj", "down_proj"}:
            stored |= _stored_experts(block, kind, tuple(tensor.shape))
        else:
            stored[name] = tuple(tensor.shape)
    return stored


def _stored_experts(block: str, kind: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The matrices that one fused tensor `[E, 2I, H]` or `[E, H, I]` is on disk."""
    experts, rows, columns = shape
    if kind == "down_proj":
        return {f"{block}.{expert}.down_proj.weight": (rows, columns) for expert in range(experts)}
    return {f"{block}.{expert}.{half}_proj.weight": (rows // 2, columns) for expert in range(experts) for half in ("gate", "up")}


def _assemble(config: KeuralConfig, state_dict: Mapping[str, Tensor]) -> KeuralMoECausalLM:
    """A model around the given tensors, without copying them."""
    config = copy.deepcopy(config)
    config.auto_map = dict(AUTO_MAP)
    with torch.device("meta"):
        model = KeuralMoECausalLM(config)
    missing, unexpected = model.load_state_dict(dict(state_dict), strict=False, assign=True)
    assert not unexpected, f"not tensors of the model: {unexpected}"
    assert set(missing) <= ({HEAD} if config.tie_word_embeddings else set()), f"tensors are missing: {missing}"
    model.tie_weights()
    return model


def _generation_config(tokenizer: KeuralTokenizer, chat: ChatSpec) -> GenerationConfig:
    """Sampling defaults; generation ends at `<|im_end|>`, and at the end of a document, which is where a base model stops."""
    return GenerationConfig(
        do_sample=chat.temperature > 0,
        temperature=chat.temperature or None,
        top_p=chat.top_p if chat.temperature > 0 else None,
        top_k=0 if chat.temperature > 0 else None,  # transformers would otherwise cut at 50
        repetition_penalty=chat.repetition_penalty,
        max_new_tokens=chat.max_new_tokens,
        eos_token_id=[tokenizer.im_end_id, tokenizer.eos_id],
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.bos_id,
    )


def _lineage(directory: Path, lineage: Mapping[str, Any], tokenizer: KeuralTokenizer, chat: ChatSpec) -> dict[str, Any]:
    """The content of `keural.json`: what was given, versions, chat defaults, and checksums of weights and tokenizer."""
    files = sorted([*directory.glob("*.safetensors"), directory / "tokenizer.model"])
    try:
        package = version("keural")
    except PackageNotFoundError:  # run from a source tree
        package = "unknown"
    return {
        **lineage,
        "keural": package,
        "transformers": transformers.__version__,
        "tokenizer_sha256": tokenizer.sha256,
        "chat": chat.model_dump(exclude={"samples"}),
        "files": {file.name: sha256_file(file) for file in files},
    }


def _read_config(directory: Path) -> KeuralConfig:
    file = directory / "config.json"
    values = read_json(file)
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind != KeuralConfig.model_type:
        raise UserError(f"{file}: describes a {kind!r} model, not 'keural'; give a directory that this package has written")
    try:
        with _quiet_transformers():
            return KeuralConfig.from_dict(values)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"{file}: {error}") from error


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory, all present."""
    if (directory / INDEX).is_file():
        names = sorted(set(read_json(directory / INDEX).get("weight_map", {}).values()))
    else:
        names = [SINGLE_FILE]
    for name in names:
        if not (directory / name).is_file():
            raise UserError(f"{directory / name}: no such file; the weights are incomplete, copy or train the model again")
    return [directory / name for name in names]


def _check_tensors(directory: Path, config: KeuralConfig) -> None:
    """Compare the names and shapes in the files' headers with what the configuration says, before anything is read."""
    found: dict[str, tuple[int, ...]] = {}
    for file in _weight_files(directory):
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: is damaged ({error}); copy or train the model again") from error
    expected = stored_tensors(config)
    for name, shape in expected.items():
        if name not in found:
            raise UserError(f"{directory}: tensor {name} is missing; the weights do not belong to this config.json")
        if found[name] != shape:
            raise UserError(f"{directory}: tensor {name} has shape {list(found[name])}, config.json asks for {list(shape)}")
    for name in found:
        if name not in expected:
            raise UserError(f"{directory}: tensor {name} is not part of the model that config.json describes")


def check_sums(directory: Path) -> None:
    """Raise `UserError` when a file of a model directory is missing or is not the one that its `keural.json` lists."""
    for name, wanted in read_lineage(directory).get("files", {}).items():
        file = directory / name
        if not file.is_file():
            raise UserError(f"{file}: no such file, though {LINEAGE} lists it; copy or train the model again")
        if sha256_file(file) != wanted:
            raise UserError(
                f"{file}: does not match its checksum in {LINEAGE}; it is damaged or was changed, copy or train it again"
            )


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Turn what safetensors raises on a full disk into the user's error."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{out}: cannot be written ({error}); free some space or choose another directory") from error


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice from transformers inside the block."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
