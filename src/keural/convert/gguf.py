"""`keural export --format gguf`: one file that llama.cpp runs, in full or reduced precision.

In: a `StoredModel`. Out: a directory with the `.gguf`, the tokenizer it is fed by, and the lineage.

The network is written as llama.cpp's architecture `granite_swa`, which is a superset of it: attention sinks so low that no
probability drains into them, and neutral multipliers, leave exactly this model. Rows of queries and keys change places, because
llama.cpp turns neighbouring dimensions where we turn dimension i with i + D/2.

llama.cpp's own tokenizer for this vocabulary (UGM) does everything but two things: it has no byte fallback, so characters without a
piece become `<unk>`, and it does not remove extra spaces as the published tokenizer does. ASCII is mended here, by naming byte
pieces by their character. For exact ids give ids, made by the tokenizer beside the file, as `keural chat` does.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as GgmlType
from gguf import GGUFWriter, TokenType
from gguf.constants import GGML_QUANT_VERSION
from numpy.typing import NDArray
from torch import Tensor

from keural.convert import ggml
from keural.convert.carried import carried, check_carried
from keural.convert.ggml import QUANTIZATIONS
from keural.convert.granite import SILENT_SINK
from keural.files import atomic_directory, check_new
from keural.pretrained.lineage import write_record
from keural.pretrained.stored_model import StoredModel
from keural.pretrained.tensor_names import EMBEDDING
from keural.tokenizer.convert import CHAT_TEMPLATE
from keural.tokenizer.model_file import BYTE, CONTROL, FIRST_BYTE_ID, IM_END, IM_START, NORMAL, UNKNOWN, UNUSED

ARCHITECTURE = "granite_swa"
_TOKEN_TYPES = {
    NORMAL: TokenType.NORMAL,
    UNKNOWN: TokenType.UNKNOWN,
    CONTROL: TokenType.CONTROL,
    BYTE: TokenType.BYTE,
    UNUSED: TokenType.UNUSED,
}
_SPACE = ord(" ")
_GENERATION_TAGS = re.compile(r"\{%- (?:end)?generation -%\}")
"""Marks of transformers around what is trained; other template engines do not know them."""
_BLOCK_ROWS = 8192
"""Rows converted at a time: 128 MB in float32 at a width of 4096."""


@dataclass(frozen=True)
class Matrix:
    """One tensor of the file: its name, shape, type, and the float32 rows that make it up, part by part."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    parts: Callable[[], Iterator[NDArray[np.float32]]]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return ggml.nbytes(self.shape, self.type)


def export_gguf(
    model: StoredModel, out: Path, quantize: str | None = None, advance: Callable[[int], None] = lambda count: None
) -> Path:
    """Write `model` as GGUF into the directory `out`; at most two copies of one tensor are in memory.

    Args:
        model: what to write.
        out: must not exist, or be empty.
        quantize: a name of `QUANTIZATIONS`; None keeps the stored precision.
        advance: told the bytes of every tensor that was read.

    Returns:
        The file.

    Raises:
        UserError: for an unknown name, a shape that llama.cpp's architecture cannot hold, a type whose maker is not installed, too
            little disk, or an `out` that is not empty.
    """
    if quantize is None:
        quantize = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[_stored_type(model)]
    ggml.check_known(quantize)
    check_carried(model.config, "gguf")
    model = model.watched(advance)
    matrices = list(_matrices(model, quantize))
    ggml.check_available({matrix.type for matrix in matrices})
    check_new(out, sum(matrix.nbytes for matrix in matrices))
    with atomic_directory(out) as directory:
        file = directory / f"{model.name}-{quantize.upper()}.gguf"
        _write(file, model, quantize, matrices)
        model.tokenizer.save(directory)
        lineage = {**model.lineage, "quantization": quantize}
        write_record(directory, lineage, model.chat)
    return out / file.name


def _stored_type(model: StoredModel) -> str:
    return str(model.weights.infos[EMBEDDING].dtype).removeprefix("torch.")


def _write(file: Path, model: StoredModel, quantize: str, matrices: list[Matrix]) -> None:
    writer = GGUFWriter(file, ARCHITECTURE)
    _add_shape(writer, model, quantize)
    _add_tokenizer(writer, model)
    for matrix in matrices:
        writer.add_tensor_info(matrix.name, matrix.shape, np.dtype(np.float32), matrix.nbytes, raw_dtype=matrix.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for matrix in matrices:
        data = np.empty(matrix.nbytes, np.uint8)
        start = 0
        for rows in matrix.parts():
            part = ggml.convert(rows, matrix.type).reshape(-1)
            data[start : start + part.nbytes] = part
            start += part.nbytes
        assert start == matrix.nbytes, f"{matrix.name}: {start} bytes instead of {matrix.nbytes}"
        writer.write_tensor_data(data)
    writer.close()


def _add_shape(writer: GGUFWriter, model: StoredModel, quantize: str) -> None:
    """What `src/models/granite-swa.cpp` of llama.cpp reads."""
    config = model.config
    assert config.head_dim is not None
    writer.add_name(model.name)
    writer.add_file_type(QUANTIZATIONS[quantize][0])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    for key, value in carried(config, "gguf").items():
        add = writer.add_array if isinstance(value, list) else writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{ARCHITECTURE}.{key}", value)
    writer.add_attention_scale(config.head_dim**-0.5)
    writer.add_logit_scale(1.0)


def _add_tokenizer(writer: GGUFWriter, model: StoredModel) -> None:
    """The vocabulary as llama.cpp's UGM tokenizer reads it; see the top of the file for what that tokenizer lacks."""
    tokenizer = model.tokenizer
    proto = tokenizer.proto
    tokens, types = [piece.piece for piece in proto.pieces], [_TOKEN_TYPES[piece.type] for piece in proto.pieces]
    scores = [piece.score for piece in proto.pieces]
    known, rare = set(tokens), min(scores) - 1
    for byte in range(1, 128):  # not NUL, which ends a string there
        character, index = chr(byte), FIRST_BYTE_ID + byte
        if byte != _SPACE and character not in known:
            tokens[index], types[index], scores[index] = character, TokenType.NORMAL, rare
    writer.add_tokenizer_model("t5")
    writer.add_token_list([*tokens, IM_START, IM_END])
    writer.add_token_scores([*scores, 0.0, 0.0])
    writer.add_token_types([*types, TokenType.CONTROL, TokenType.CONTROL])
    writer.add_bos_token_id(tokenizer.bos_id)
    # A base model ends its texts with </s> and has never been taught to end a turn.
    ends = model.ends or [tokenizer.im_end_id]
    writer.add_eos_token_id(ends[0])
    if tokenizer.im_end_id in ends:
        writer.add_eot_token_id(tokenizer.im_end_id)
    writer.add_unk_token_id(tokenizer.unk_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    # llama.cpp would put a space in front where it removes spaces, which this vocabulary does not have there.
    writer.add_remove_extra_whitespaces(False)
    charsmap = proto.normalizer_spec.precompiled_charsmap
    if charsmap:
        writer.add_precompiled_charsmap(charsmap)
    writer.add_chat_template(_GENERATION_TAGS.sub("", CHAT_TEMPLATE))


def _matrices(model: StoredModel, quantize: str) -> Iterator[Matrix]:
    """Every tensor of the file, in llama.cpp's order: embedding, layers, final norm."""
    config, read = model.config, model.weights.read
    heads, kv_heads, experts = config.num_attention_heads, config.num_key_value_heads, range(config.num_local_experts)
    hidden, inner = config.hidden_size, config.intermediate_size
    make = partial(_matrix, model, quantize)
    yield make("token_embd.weight", 0, [EMBEDDING])
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        expert = f"{ours}.mlp.experts"
        yield make(f"{theirs}.attn_norm.weight", layer, [f"{ours}.input_layernorm.weight"])
        yield make(f"{theirs}.attn_q.weight", layer, [f"{ours}.self_attn.q_proj.weight"], arrange=partial(_interleaved, heads))
        yield make(f"{theirs}.attn_k.weight", layer, [f"{ours}.self_attn.k_proj.weight"], arrange=partial(_interleaved, kv_heads))
        yield make(f"{theirs}.attn_v.weight", layer, [f"{ours}.self_attn.v_proj.weight"])
        yield make(f"{theirs}.attn_output.weight", layer, [f"{ours}.self_attn.o_proj.weight"])
        yield Matrix(f"{theirs}.attn_sinks.weight", (heads,), GgmlType.F32, partial(_sinks, heads))
        yield make(f"{theirs}.ffn_norm.weight", layer, [f"{ours}.post_attention_layernorm.weight"])
        yield Matrix(
            f"{theirs}.ffn_gate_inp.weight", (len(experts), hidden), GgmlType.F32, partial(_rows, read, [f"{ours}.mlp.gate.weight"])
        )
        gate_up = [f"{expert}.{index}.{half}_proj.weight" for index in experts for half in ("gate", "up")]
        yield make(f"{theirs}.ffn_gate_up_exps.weight", layer, gate_up, shape=(len(experts), 2 * inner, hidden))
        down = [f"{expert}.{index}.down_proj.weight" for index in experts]
        yield make(f"{theirs}.ffn_down_exps.weight", layer, down, shape=(len(experts), hidden, inner))
    yield make("output_norm.weight", 0, ["model.norm.weight"])


def _matrix(
    model: StoredModel,
    quantize: str,
    name: str,
    layer: int,
    sources: list[str],
    shape: tuple[int, ...] | None = None,
    arrange: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Matrix:
    """One tensor out of stored ones; vectors stay in float32, matrices get the type of their kind."""
    shape = shape or model.weights.infos[sources[0]].shape
    kind = name.removesuffix(".weight").rpartition(".")[2]
    wanted = GgmlType.F32 if len(shape) == 1 else QUANTIZATIONS[quantize][1](kind, layer, model.config)
    return Matrix(name, shape, ggml.fitting(wanted, shape[-1], kind), partial(_rows, model.weights.read, sources, arrange))


def _rows(
    read: Callable[[str], Tensor], sources: list[str], arrange: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> Iterator[NDArray[np.float32]]:
    """The rows of stored tensors one below the other, in blocks; a vector is one row."""
    for source in sources:
        tensor = arrange(read(source))
        for block in tensor.reshape(-1, tensor.shape[-1]).split(_BLOCK_ROWS):
            yield block.float().contiguous().numpy()


def _sinks(heads: int) -> Iterator[NDArray[np.float32]]:
    yield np.full((1, heads), SILENT_SINK, np.float32)


def _interleaved(heads: int, weight: Tensor) -> Tensor:
    """Rows of each head `[D, H]` in the order 0, D/2, 1, D/2 + 1, …, so that neighbours are the pairs that turn together."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
