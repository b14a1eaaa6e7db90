"""ggml's quantization kernels, from the shared object in the xllamacpp wheel."""

from __future__ import annotations

import ctypes
import math
from functools import cache
from pathlib import Path

import numpy as np
import torch
import xllamacpp
from luthier.api import ModelError

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

T = GGMLQuantizationType


@cache
def _library() -> ctypes.CDLL:
    (path,) = Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")
    library = ctypes.CDLL(str(path))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    return library


def prepare(kinds: set[GGMLQuantizationType]) -> None:
    """Build the tables that some types need, before several threads want them."""
    for kind in kinds:
        _library().ggml_quantize_init(int(kind))


def size_in_bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    """The size of a tensor of that type; its rows have to be whole blocks."""
    block, size = GGML_QUANT_SIZES[kind]
    elements = math.prod(shape)
    assert shape[-1] % block == 0, "the mix chooses types that fit"
    return elements // block * size


def to_type(
    rows: np.ndarray, kind: GGMLQuantizationType, name: str, importance: np.ndarray | None = None
) -> np.ndarray:
    """Some rows of a tensor in that type: float16, float32, or raw bytes.

    Args:
        rows: float32, shape (..., columns), contiguous.
        name: For messages.
        importance: How much each column matters, float32, shape (columns,); for types with blocks only.

    Raises:
        ModelError: a value is not finite, or too large for float16.
    """
    tensor = torch.from_numpy(rows)
    # ggml quantizes NaN silently. The sum is finite unless an entry is not, or the sum itself overflows.
    if not math.isfinite(float(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
        raise ModelError(
            "the tensor has NaN or infinite values",
            where=name,
            hint="train again with a lower learning rate, or take an earlier checkpoint",
        )
    if kind == T.F32:
        return rows
    if kind == T.F16:
        half = tensor.half()
        if not bool(torch.isfinite(half).all()):
            raise ModelError("a weight is too large for F16", where=name, hint="export BF16 or F32")
        return half.numpy()
    columns = rows.shape[-1]
    out = np.empty(size_in_bytes(rows.shape, kind), dtype=np.uint8)
    matters = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32).ctypes.data
    _library().ggml_quantize_chunk(
        int(kind), rows.ctypes.data, out.ctypes.data, 0, rows.size // columns, columns, matters
    )
    return out
