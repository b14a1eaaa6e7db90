"""ggml's quantization kernels, out of the shared object that the xllamacpp wheel brings."""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import xllamacpp
from luthier.api import ModelError

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

T = GGMLQuantizationType
ROWS_AT_ONCE = 1024


@cache
def _library() -> ctypes.CDLL:
    (path,) = Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")
    library = ctypes.CDLL(str(path))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    return library


def size_in_bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    """The size of a tensor of that type; its rows have to be whole blocks."""
    block, size = GGML_QUANT_SIZES[kind]
    elements = int(np.prod(shape))
    assert shape[-1] % block == 0, "the mix chooses types that fit"
    return elements // block * size


def to_type(tensor: np.ndarray, kind: GGMLQuantizationType, name: str) -> np.ndarray:
    """The tensor's data in that type: float16, float32, or raw bytes.

    Args:
        tensor: float32, shape (..., columns), contiguous.
        name: For messages.

    Raises:
        ModelError: a value is not finite, or too large for float16.
    """
    # ggml quantizes NaN without a word.
    if not bool(np.isfinite(tensor).all()):
        raise ModelError("the tensor has NaN or infinite values", where=name)
    if kind == T.F32:
        return tensor
    if kind == T.F16:
        with np.errstate(over="ignore"):
            half = tensor.astype(np.float16)
        if not bool(np.isfinite(half).all()):
            raise ModelError("a weight is too large for F16", where=name, hint="export BF16 or F32")
        return half
    return _quantized(tensor, kind)


def _quantized(tensor: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    columns = tensor.shape[-1]
    rows = tensor.size // columns
    out = np.empty(size_in_bytes(tensor.shape, kind), dtype=np.uint8)
    library = _library()

    def quantize(first: int) -> None:
        count = min(ROWS_AT_ONCE, rows - first)
        # The kernel takes both whole buffers and the place of the first element.
        library.ggml_quantize_chunk(
            int(kind), tensor.ctypes.data, out.ctypes.data, first * columns, count, columns, None
        )

    # The kernels release the interpreter's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(quantize, range(0, rows, ROWS_AT_ONCE)))
    return out
