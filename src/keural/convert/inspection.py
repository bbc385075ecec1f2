"""`keural inspect`: what a model is, computed from its files, beside what the model card says.

In: a model directory, or a checkpoint that is not imported yet. Out: plain values, which `console` prints and `--json` writes.
"""

from collections import Counter
from collections.abc import Mapping
from importlib.resources import files
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from keural.card import SamplingDefaults
from keural.convert.carried import RULES, problems
from keural.convert.foreign_checkpoint import Checkpoint, open_checkpoint
from keural.convert.gguf_header import check_header
from keural.errors import UserError
from keural.files import read_object
from keural.model import SHAPE, KeuralConfig, count_parameters
from keural.pretrained.lineage import Coverage, check_sums, read_record
from keural.pretrained.location import CONFIG, check_there, model_directory
from keural.pretrained.network_code import NETWORK_CODE, other_code_line
from keural.pretrained.stored_model import load_tokenizer, open_network
from keural.pretrained.tensor_names import is_published, stored_name
from keural.pretrained.weights import Weights

CARD = files("keural.convert").joinpath("card.yaml")
_CONFIG_FIELDS = (*SHAPE, "max_position_embeddings", "rms_norm_eps", "sliding_window")


NOTHING = "no record: nothing was verified"
NOT_ASKED = "not asked for (--verify)"


class Entry(NamedTuple):
    """One line of the ledger."""

    item: str
    stated: str
    """By the model card."""
    computed: str
    """From the files; empty where they do not say."""
    verdict: str
    """`agrees`, `differs` or `not in the files`."""
    note: str


def inspect_path(path: Path, verify: bool = False) -> dict[str, Any]:
    """What there is to say of a model directory, a GGUF file or the directory with one, or a checkpoint that is not imported yet.

    Raises `UserError` for anything else.
    """
    check_there(path, "a model directory or a checkpoint")
    if (directory := _model_directory(path)) is not None:
        return inspect_model(directory, verify) if _is_ours(directory) else inspect_checkpoint(directory, verify)
    files = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(f"{path}: holds {len(files)} GGUF files ({', '.join(file.name for file in files)}); name one of them")
    return inspect_gguf(files[0], verify) if files else inspect_checkpoint(path, verify)


def _model_directory(path: Path) -> Path | None:
    try:
        return model_directory(path)
    except UserError:
        return None


def _is_ours(directory: Path) -> bool:
    """Whether a directory with a `config.json` has this package's layout: a Keural model in safetensors under our names."""
    try:
        if read_object(directory / CONFIG).get("model_type") != KeuralConfig.model_type:
            return False
        names = open_checkpoint(directory, verify=False).weights.infos
    except UserError:  # whoever opens it says why, once it is verified
        return True
    return any(directory.glob("*.safetensors")) and all(stored_name(name) == name for name in names)


def inspect_model(path: Path, verify: bool = False) -> dict[str, Any]:
    """Everything that the files of a model directory say of the model.

    With `verify`, the files are compared with their checksums. Raises `UserError` when they do not describe one Keural model.
    """
    stored = open_network(path, verify)
    directory, config, weights = stored.directory, stored.config, stored.weights
    values = {
        "directory": str(directory),
        "verified": _verified(stored.coverage),
        "architecture": "KeuralMoECausalLM",
        **_sizes(config, weights),
        **{name: getattr(config, name) for name in _CONFIG_FIELDS},
        "rope_theta": config.rope_parameters["rope_theta"],
        **_window(config),
        **_tokenizer(directory),
        **_generation(directory),
        "cache": _cache(config, weights),
        "code": _code(directory),
        "lineage": dict(stored.lineage),
        "exports": exports(config),
    }
    values["step"] = (values["lineage"].get("source") or {}).get("step")
    values["ledger"] = [entry._asdict() for entry in ledger(values)]
    return values


def _verified(coverage: Coverage | None) -> str:
    return NOT_ASKED if coverage is None else str(coverage)


def inspect_checkpoint(path: Path, verify: bool = False) -> dict[str, Any]:
    """What a checkpoint says that has not been imported. Raises `UserError` when it cannot be opened."""
    checkpoint: Checkpoint = open_checkpoint(path, verify)
    infos = checkpoint.weights.infos
    return {
        "checkpoint": str(checkpoint.where),
        "verified": (checkpoint.verified or NOTHING) if verify else NOT_ASKED,
        "names": "published" if any(is_published(name) for name in infos) else "this package's or another",
        "tensors": len(infos),
        "parameters": sum(prod(info.shape) for info in infos.values()),
        "dtype": _dtypes(checkpoint.weights),
        "bytes": checkpoint.weights.nbytes,
        "progress": dict(checkpoint.progress),
        "config": dict(checkpoint.config or {}),
    }


def inspect_gguf(file: Path, verify: bool = False) -> dict[str, Any]:
    """What the header of a GGUF file says. Raises `UserError` when it cannot be read."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(f"{file}: the gguf package reads it: pip install 'keural[gguf]'") from error
    check_header(file)
    try:
        reader = GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.ggml.")}
    except Exception as error:  # the reader trusts the file and stumbles in many ways
        raise UserError(f"{file}: is damaged ({str(error)[:200] or type(error).__name__}); copy or export it again") from error
    coverage = check_sums(file.parent, [file.name]) if verify else None
    types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    template = fields.pop("tokenizer.chat_template", None)
    return {
        "file": str(file),
        "verified": _verified(coverage),
        "parameters": sum(int(tensor.n_elements) for tensor in reader.tensors if not tensor.name.endswith("attn_sinks.weight")),
        "bytes": file.stat().st_size,
        "tensors": dict(types),
        "header": {name: value for name, value in fields.items() if not name.startswith("GGUF.")},
        "chat_template": template is not None,
        "lineage": read_record(file.parent),
    }


def ledger(values: Mapping[str, Any]) -> list[Entry]:
    """Each figure of the model card beside the one computed from the files."""
    return [_entry(row, values.get(row["field"])) for row in yaml.safe_load(CARD.read_text(encoding="utf-8"))]


def exports(config: KeuralConfig) -> dict[str, str]:
    """What the model can be exported to: for each format `yes`, or why not."""
    found = {name: problems(config, name) for name in RULES}
    return {name: f"no: {'; '.join(reasons)}" if reasons else "yes" for name, reasons in found.items()}


def _sizes(config: KeuralConfig, weights: Weights) -> dict[str, Any]:
    """Parameters in all and per token, counted in the files, and what they are stored as."""
    in_files = sum(prod(info.shape) for info in weights.infos.values())
    total, active = count_parameters(config)
    assert in_files == total, f"{in_files} weights in the files, {total} by the formula"
    return {"parameters": total, "active_parameters": active, "dtype": _dtypes(weights), "bytes": weights.nbytes}


def _dtypes(weights: Weights) -> str:
    counts = Counter(str(info.dtype).removeprefix("torch.") for info in weights.infos.values())
    return ", ".join(sorted(counts))


def _window(config: KeuralConfig) -> dict[str, Any]:
    sliding = [index for index, kind in enumerate(config.layer_types) if kind == "sliding_attention"]
    even = list(range(0, config.num_hidden_layers, 2))
    named = {"even": even, "none": [], "all": list(range(config.num_hidden_layers))}
    return {
        "earlier_tokens_in_window": config.sliding_window - 1 if config.sliding_window else None,
        "sliding_layers": next((name for name, layers in named.items() if layers == sliding), str(sliding)),
    }


def _code(directory: Path) -> str:
    """Whose network code the directory carries for programs that run it."""
    if (line := other_code_line(directory)) is not None:
        return line.removeprefix(f"{directory}: ")
    return "this package's" if any((directory / name).is_file() for name in NETWORK_CODE) else "none"


def _tokenizer(directory: Path) -> dict[str, Any]:
    if not (directory / "tokenizer.model").is_file():
        return {"tokenizer": None}
    tokenizer = load_tokenizer(directory)
    ids = {name: getattr(tokenizer, name) for name in ("im_start_id", "im_end_id", "bos_id", "eos_id", "pad_id")}
    return {"tokenizer": {"kind": tokenizer.kind, "sha256": tokenizer.sha256}, **ids}


def _generation(directory: Path) -> dict[str, Any]:
    """Of `generation_config.json`; the first of several ends counts."""
    file = directory / "generation_config.json"
    stored = read_object(file) if file.is_file() else {}
    end = stored.get("eos_token_id")
    return {
        "generation_end": end[0] if isinstance(end, list) and end else end,
        **{name: stored.get(name) for name in SamplingDefaults._fields},
    }


def _cache(config: KeuralConfig, weights: Weights) -> dict[str, int]:
    """Bytes of keys and values in the stored precision: for one token, and for a full context with and without bounded windows."""
    assert config.head_dim is not None
    per_layer = 2 * config.num_key_value_heads * config.head_dim * next(iter(weights.infos.values())).dtype.itemsize
    context = config.max_position_embeddings
    kept = [
        min(context, config.sliding_window or context) if kind == "sliding_attention" else context for kind in config.layer_types
    ]
    return {
        "bytes_per_token": per_layer * config.num_hidden_layers,
        "bytes_full_context": per_layer * config.num_hidden_layers * context,
        "bytes_full_context_bounded": per_layer * sum(kept),
    }


def _entry(row: Mapping[str, Any], computed: Any) -> Entry:
    stated, note = row["stated"], row.get("note", "")
    if computed is None:
        return Entry(row["item"], _shown(stated), "", "not in the files", note)
    agrees = _billions(computed) == stated.lstrip("~") if _is_rounded(stated) else computed == stated
    return Entry(row["item"], _shown(stated), _shown(computed), "agrees" if agrees else "differs", note)


def _is_rounded(stated: Any) -> bool:
    """Whether the card gives a number of billions with two decimals."""
    return isinstance(stated, str) and stated.endswith("B") and stated.lstrip("~")[0].isdigit()


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f}B"


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
