"""Writes safetensors files whose tensors are known before the first is computed, in any order."""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from luthier.api import ModelError
from luthier.artifacts.json_files import write_json
from luthier.artifacts.tensors import INDEX, SIZES
from luthier.merging.files import DTYPES, Scratch, bytes_of

ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Described:
    """A tensor to come: its dtype as safetensors names it, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * SIZES[self.dtype]


def size_of(tensors: Mapping[str, Described]) -> int:
    """How many bytes they are together."""
    return sum(about.bytes for about in tensors.values())


def shards_of(tensors: Mapping[str, Described], limit: int) -> list[list[str]]:
    """The names of the tensors of each file, none of them larger than `limit` bytes unless one tensor is."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, about in tensors.items():
        if shards[-1] and size + about.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += about.bytes
    return shards


def reserve(handle: int, size: int) -> None:
    """Give a file its blocks at once: a full disk is known before the work, and writing takes a quarter less of the
    processor. Where the file system cannot, nothing is done: `os.posix_fallocate` would write zeros there.

    Raises:
        OSError: the disk is full.
    """
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).fallocate(handle, 0, ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
        return
    number = ctypes.get_errno()
    if number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        raise OSError(number, os.strerror(number))


class Output:
    """The model's files: made at once in their full size, filled by several workers.

    Args:
        folder: Where they go; `paths` are the files, once they are made.
        tensors: All tensors, in the order of the model.
        limit: The largest size of one file's tensors, in bytes.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Described], limit: int) -> None:
        self.tensors = dict(tensors)
        self.paths: list[Path] = []
        self._handles: list[int] = []
        self._places: dict[str, tuple[int, int]] = {}
        shards = shards_of(tensors, limit)
        names = [_file_name(number, len(shards)) for number in range(1, len(shards) + 1)]
        for file, shard in zip(names, shards, strict=True):
            self._make(folder / file, shard)
        if len(shards) > 1:
            where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
            write_json(folder / INDEX, {"metadata": {"total_size": size_of(tensors)}, "weight_map": where})

    def _make(self, path: Path, names: Sequence[str]) -> None:
        # Wide dtypes first, so that every tensor begins at a multiple of its element size.
        order = sorted(names, key=lambda name: -SIZES[self.tensors[name].dtype])
        described: dict[str, object] = {"__metadata__": {"format": "pt"}}
        place = 0
        for name in order:
            about = self.tensors[name]
            end = place + about.bytes
            described[name] = {"dtype": about.dtype, "shape": list(about.shape), "data_offsets": [place, end]}
            place = end
        text = json.dumps(described, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        self.paths.append(path)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._handles.append(handle)
        os.write(handle, len(text).to_bytes(8, "little") + text)
        os.ftruncate(handle, 8 + len(text) + place)
        reserve(handle, 8 + len(text) + place)
        for name in order:
            self._places[name] = (handle, 8 + len(text) + _offset(described[name]))

    def write(self, name: str, start: int, values: Tensor, scratch: Scratch) -> None:
        """Write entries of a tensor, from the entry `start` on.

        Args:
            values: float32, on the CPU or a GPU; they are stored in the tensor's own dtype.

        Raises:
            ModelError: a value is NaN or infinite, or does not fit into the dtype.
        """
        about = self.tensors[name]
        dtype = DTYPES[about.dtype]
        raw = scratch.raw(values.numel() * SIZES[about.dtype])
        stored = raw.view(dtype)
        flat = values.reshape(-1)
        stored.copy_(flat.to(dtype) if values.is_cuda else flat)
        # The sum is finite unless a value is not, or the sum itself overflows: check entry by entry then.
        if not math.isfinite(float(values.sum())) and not bool(torch.isfinite(values).all()):
            raise ModelError(
                "the merged tensor has NaN or infinite values", where=name, hint="check weights and parameters"
            )
        if dtype == torch.float16 and not bool(torch.isfinite(stored).all()):
            raise ModelError(
                "the merged values do not fit into float16",
                where=name,
                hint="store them with `dtype: bfloat16` or `float32`",
            )
        self.raw(name, start * SIZES[about.dtype], raw)

    def raw(self, name: str, first: int, data: Tensor) -> None:
        """Write bytes of a tensor, from the byte `first` on."""
        handle, place = self._places[name]
        view = bytes_of(data)
        place += first
        while view:
            done = os.pwrite(handle, view, place)
            place += done
            view = view[done:]

    def sync(self) -> None:
        """Wait until all is on the disk."""
        for handle in self._handles:
            os.fsync(handle)

    def close(self) -> None:
        """Close the files."""
        for handle in self._handles:
            os.close(handle)
        self._handles.clear()


def _offset(entry: object) -> int:
    assert isinstance(entry, dict)
    return int(entry["data_offsets"][0])


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
