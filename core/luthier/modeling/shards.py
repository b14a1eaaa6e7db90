"""Writes weights into safetensors files of a limited size, one tensor after the other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from luthier.artifacts.tensors import INDEX, model_tensors


def tensors_of(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a model folder, one at a time, in the order of its files, see `own_tensors`."""
    headers = model_tensors(folder)
    with ExitStack() as stack:
        files: dict[str, Any] = {
            file: stack.enter_context(safe_open(folder / file, framework="pt"))
            for file in sorted({header.file for header in headers.values()})
        }
        for name, header in headers.items():
            yield name, files[header.file].get_tensor(header.name)


class ShardWriter:
    """Takes tensors and writes a file whenever enough are there; `close` names the files and writes the index.

    Args:
        folder: Where the files go.
        limit: The largest size of a file in bytes, unless one tensor is larger.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self.total = 0
        self._waiting: dict[str, Tensor] = {}
        self._size = 0
        self._files: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor."""
        if self._waiting and self._size + tensor.nbytes > self.limit:
            self._flush()
        self._waiting[name] = tensor.contiguous()
        self._size += tensor.nbytes
        self.total += tensor.nbytes

    def _flush(self) -> None:
        save_file(self._waiting, self._part(len(self._files)), metadata={"format": "pt"})
        self._files.append(list(self._waiting))
        self._waiting = {}
        self._size = 0

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number}.safetensors"

    def close(self) -> None:
        """Write what is left."""
        if self._waiting or not self._files:
            self._flush()
        count = len(self._files)
        names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
        if count == 1:
            names = ["model.safetensors"]
        for number, name in enumerate(names):
            self._part(number).rename(self.folder / name)
        if count > 1:
            where = {tensor: name for name, tensors in zip(names, self._files, strict=True) for tensor in tensors}
            index = {"metadata": {"total_size": self.total}, "weight_map": where}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
