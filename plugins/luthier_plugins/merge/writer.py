"""Writes a safetensors file one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from luthier.artifacts.models import TensorHeader

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
ALIGNMENT = 8


class StreamedFile:
    """A safetensors file whose tensors are known before the first is computed.

    Args:
        path: The file to write.
        headers: The dtype and shape of every tensor to come.
    """

    def __init__(self, path: Path, headers: Mapping[str, TensorHeader]) -> None:
        self._path = path
        self._headers = headers
        # Wide dtypes first, so that every tensor begins at a multiple of its element size.
        self.order = sorted(headers, key=lambda name: (-SIZES[headers[name].dtype], name))

    def write(self, tensors: Iterable[torch.Tensor]) -> None:
        """Write the tensors; they come in the order of `order`, and are held one at a time."""
        with self._path.open("wb") as file:
            file.write(self._preamble())
            for name, tensor in zip(self.order, tensors, strict=True):
                header = self._headers[name]
                assert tuple(tensor.shape) == header.shape, name
                stored = tensor.to(DTYPES[header.dtype]).contiguous().flatten()
                # numpy has no bfloat16: bytes are bytes.
                file.write(stored.view(torch.uint8).numpy().data)

    def _preamble(self) -> bytes:
        described: dict[str, object] = {"__metadata__": {"format": "pt"}}
        place = 0
        for name in self.order:
            header = self._headers[name]
            end = place + math.prod(header.shape) * SIZES[header.dtype]
            described[name] = {"dtype": header.dtype, "shape": list(header.shape), "data_offsets": [place, end]}
            place = end
        text = json.dumps(described, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        return len(text).to_bytes(8, "little") + text
