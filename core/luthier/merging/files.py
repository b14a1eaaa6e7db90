"""Reads parts of tensors from safetensors files as float32."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.api import ModelError
from luthier.artifacts.tensors import SIZES, TensorHeader
from luthier.merging.parts import Grid

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def bytes_of(raw: Tensor) -> memoryview:
    """A uint8 tensor's memory."""
    array: Any = raw.numpy()
    return memoryview(array)


def fill_on_cpu(out: Tensor, fill: Callable[[Tensor, int], None]) -> None:
    """Fill rows that may be on a GPU with what is computed on the CPU: the same bits wherever they are.

    Args:
        out: Shape (rows, columns); whole parts, as the CPU works on them, or one.
        fill: Fills rows on the CPU, given the number of entries before them.
    """
    if not out.is_cuda:
        fill(out, 0)
        return
    # Part by part: a product of matrices has other bits in another number of rows.
    for first, last in Grid(*out.shape).spans():
        here = torch.empty(last - first, out.shape[1])
        fill(here, first * out.shape[1])
        out[first:last].copy_(here)


class Scratch:
    """One worker's buffers, used again for every part.

    Args:
        pinned: Whether bytes stay where a GPU can copy them from, several times as fast.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self._buffers: dict[int, Tensor] = {}
        self._pinned = pinned
        self._raw = torch.empty(0, dtype=torch.uint8)

    def floats(self, place: int, count: int) -> Tensor:
        """A float32 buffer of `count` entries; what was in it at this place is lost."""
        if place not in self._buffers or self._buffers[place].numel() < count:
            self._buffers[place] = torch.empty(count)
        return self._buffers[place][:count]

    def raw(self, count: int) -> Tensor:
        """A buffer of `count` bytes; what was in it is lost."""
        if self._raw.numel() < count:
            self._raw = torch.empty(count, dtype=torch.uint8, pin_memory=self._pinned)
        return self._raw[:count]


class Files:
    """The safetensors files of one folder, opened once and read by place: threads do not disturb each other."""

    def __init__(self, folder: Path, headers: Mapping[str, TensorHeader]) -> None:
        self.folder = folder
        self.headers = dict(headers)
        self._open: dict[str, int] = {}
        for name in sorted({header.file for header in headers.values()}):
            self._open[name] = os.open(folder / name, os.O_RDONLY)

    def close(self) -> None:
        """Close the files."""
        for handle in self._open.values():
            os.close(handle)
        self._open.clear()

    def raw(self, name: str, first: int, out: Tensor) -> None:
        """Fill `out`, uint8, with the tensor's bytes from the byte `first` on."""
        header = self.headers[name]
        if first + out.numel() > math.prod(header.shape) * SIZES[header.dtype]:
            raise ModelError("is shorter than what is read of it", where=f"{self.folder / header.file}: {name}")
        view = bytes_of(out)
        place = header.start + first
        while view:
            got = os.preadv(self._open[header.file], [view], place)
            if got == 0:
                raise ModelError("ends before the tensor does", where=f"{self.folder / header.file}: {name}")
            place += got
            view = view[got:]

    def floats(self, name: str, start: int, out: Tensor, scratch: Scratch) -> None:
        """Fill `out`, float32, on the CPU or a GPU, with the tensor's entries from `start` on."""
        header = self.headers[name]
        dtype = DTYPES[header.dtype]
        size = SIZES[header.dtype]
        if dtype == torch.float32 and not out.is_cuda:
            self.raw(name, start * size, out.view(torch.uint8))
            return
        raw = scratch.raw(out.numel() * size)
        self.raw(name, start * size, raw)
        # Made float32 where it is needed: most models are stored in less, and less is copied to a GPU then.
        out.copy_(raw.view(dtype).to(out.device))

    def whole(self, name: str) -> Tensor:
        """A whole tensor as float32, in its own shape."""
        out = torch.empty(math.prod(self.headers[name].shape))
        self.floats(name, 0, out, Scratch())
        return out.view(self.headers[name].shape)
