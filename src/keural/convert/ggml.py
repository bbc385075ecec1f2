"""Number formats of GGUF files: which tensor gets which, how many bytes that is, and the conversion.

In: rows of float32. Out: their bytes. F32, F16, BF16 and Q8_0 are converted by the `gguf` package. The K types and their stand-ins
have no Python writer; llama.cpp's own routine does them, which comes with llama-cpp-python.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGMLQuantizationType as GgmlType
from gguf import LlamaFileType, quants
from gguf.constants import GGML_QUANT_SIZES
from numpy.typing import NDArray

from keural.errors import UserError, nearest

if TYPE_CHECKING:
    from keural.model import KeuralConfig

_ROWS = 512
"""Rows that one thread converts at a time."""
_BY_PYTHON = frozenset({GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.Q8_0})
_WIDE = frozenset({GgmlType.F32, GgmlType.BF16})
_LARGEST_HALF = 65504.0
"""The largest number of float16, which values or the scales of blocks are stored in."""
_STAND_IN = {GgmlType.Q4_K: GgmlType.Q5_0, GgmlType.Q5_K: GgmlType.Q5_1, GgmlType.Q6_K: GgmlType.Q8_0}
"""What llama.cpp takes for rows that a K type's blocks of 256 do not divide."""

TypeOf = Callable[[str, int, "KeuralConfig"], GgmlType]


def plain(ggml_type: GgmlType) -> TypeOf:
    """Every matrix in one type."""
    return lambda kind, layer, config: ggml_type


def q4_k_m(kind: str, layer: int, config: "KeuralConfig") -> GgmlType:
    """llama.cpp's mixture Q4_K_M: the tensors that suffer most from four bits get more.

    These are the embedding (it is the head, too), the projections down in the layers that `_more_bits` names, values, and for
    models of eight experts, where attention is a small part, all of attention but the queries.
    """
    eight = config.num_local_experts == 8
    more = _more_bits(layer, config.num_hidden_layers)
    return {
        "token_embd": GgmlType.Q6_K,
        "attn_k": GgmlType.Q8_0 if eight else GgmlType.Q4_K,
        "attn_v": GgmlType.Q8_0 if eight else GgmlType.Q6_K if more else GgmlType.Q4_K,
        "attn_output": GgmlType.Q5_K if eight else GgmlType.Q4_K,
        "ffn_down_exps": GgmlType.Q6_K if more else GgmlType.Q4_K,
    }.get(kind, GgmlType.Q4_K)


def _more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


QUANTIZATIONS: dict[str, tuple[LlamaFileType, TypeOf]] = {
    "f32": (LlamaFileType.ALL_F32, plain(GgmlType.F32)),
    "f16": (LlamaFileType.MOSTLY_F16, plain(GgmlType.F16)),
    "bf16": (LlamaFileType.MOSTLY_BF16, plain(GgmlType.BF16)),
    "q8_0": (LlamaFileType.MOSTLY_Q8_0, plain(GgmlType.Q8_0)),
    "q4_k_m": (LlamaFileType.MOSTLY_Q4_K_M, q4_k_m),
}
"""Names of `--quantize`: the file type that is noted, and the type of each kind of matrix."""


def check_known(name: str) -> None:
    """Raise `UserError` unless `name` is one of `QUANTIZATIONS`."""
    if name not in QUANTIZATIONS:
        raise UserError(f"--quantize {name}: unknown{nearest(name, QUANTIZATIONS)}; known are {', '.join(QUANTIZATIONS)}")


def fitting(ggml_type: GgmlType, columns: int, kind: str) -> GgmlType:
    """`ggml_type`, or what llama.cpp takes where its blocks do not divide the columns. The embedding then keeps eight bits."""
    if columns % _block(ggml_type) == 0:
        return ggml_type
    substitute = GgmlType.Q8_0 if kind == "token_embd" else _STAND_IN.get(ggml_type, ggml_type)
    return substitute if columns % _block(substitute) == 0 else GgmlType.F16


def nbytes(shape: tuple[int, ...], ggml_type: GgmlType) -> int:
    """Bytes of a tensor in a type whose blocks divide its rows."""
    block, size = GGML_QUANT_SIZES[ggml_type]
    found: int = prod(shape) // block * size
    return found


def check_available(types: set[GgmlType]) -> None:
    """Raise `UserError` when a type needs llama.cpp and it is not installed."""
    if not types <= _BY_PYTHON and find_spec("llama_cpp") is None:
        names = ", ".join(sorted(ggml_type.name for ggml_type in types - _BY_PYTHON))
        raise UserError(f"{names} are made by llama.cpp, which is not installed: pip install 'keural[llama]', or take q8_0")


def convert(rows: NDArray[np.float32], ggml_type: GgmlType) -> NDArray[np.uint8]:
    """Rows `[N, columns]` in a type whose blocks divide the columns; returns their bytes `[N, bytes of a row]`.

    Raises `UserError` for values that the type cannot hold.
    """
    if ggml_type not in _WIDE and np.abs(rows).max(initial=0) > _LARGEST_HALF:
        raise UserError(f"weights above {_LARGEST_HALF:,.0f} do not fit into {ggml_type.name}; export as bf16 or f32")
    one = _quantized if ggml_type not in _BY_PYTHON else _converted
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        parts = pool.map(lambda start: one(rows[start : start + _ROWS], ggml_type), range(0, len(rows), _ROWS))
        return np.concatenate(list(parts))


def _converted(rows: NDArray[np.float32], ggml_type: GgmlType) -> NDArray[np.uint8]:
    found: NDArray[np.uint8] = quants.quantize(rows, ggml_type).view(np.uint8)
    return found


def _quantized(rows: NDArray[np.float32], ggml_type: GgmlType) -> NDArray[np.uint8]:
    """What llama.cpp's quantizer makes of rows, without an importance matrix."""
    count, columns = rows.shape
    rows = np.ascontiguousarray(rows)
    result = np.empty((count, nbytes((columns,), ggml_type)), np.uint8)
    written = _ggml().ggml_quantize_chunk(int(ggml_type), rows.ctypes.data, result.ctypes.data, 0, count, columns, None)
    assert written == result.nbytes, f"ggml wrote {written} bytes instead of {result.nbytes}"
    return result


@cache
def _ggml() -> Any:
    """llama.cpp's library of number formats, loaded from where llama-cpp-python keeps it."""
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    file = next((file for file in sorted(folder.glob("*ggml-base*")) if file.suffix in {".so", ".dylib", ".dll"}), None)
    if file is None:
        raise UserError(f"{folder}: holds no ggml-base library; install llama-cpp-python again: pip install 'keural[llama]'")
    library = ctypes.CDLL(str(file))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return library


def _block(ggml_type: GgmlType) -> int:
    found: int = GGML_QUANT_SIZES[ggml_type][0]
    return found
