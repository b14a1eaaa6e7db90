"""Models in memory: a trial costs a merge and an evaluation, and nothing is read or written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import psutil
import torch
from luthier.api import Artifact, ModelError
from luthier.artifacts.tensors import TensorHeader
from luthier.merging.files import DTYPES, Scratch
from luthier.merging.reader import Source, whole
from luthier.merging.writer import Described
from torch import Tensor

SHARE = 0.5
"""The share of the free memory that the inputs may take."""


class Held:
    """A model whose tensors are held as float32."""

    def __init__(self, source: Source) -> None:
        self.artifact: Artifact = source.artifact
        self.label = source.label
        self.content = source.content
        self.config = source.config
        self.headers: dict[str, TensorHeader] = source.headers
        self._source = source
        self._tensors = {name: whole(source, name) for name, header in self.headers.items() if header.dtype in DTYPES}

    def raw(self, name: str, first: int, out: Tensor) -> None:
        self._source.raw(name, first, out)

    def read(self, name: str, start: int, out: Tensor, scratch: Scratch) -> None:
        out.view(-1).copy_(self._tensors[name].view(-1)[start : start + out.numel()])


def in_memory_if_they_fit(sources: list[Source]) -> list[Source]:
    """The models in memory when all of them fit; else as they are, read from the disk by every trial."""
    needed = sum(4 * torch.Size(header.shape).numel() for source in sources for header in source.headers.values())
    if needed > SHARE * psutil.virtual_memory().available:
        return sources
    return [Held(source) for source in sources]


class IntoModel:
    """Stands where the engine writes files: the merged values become the parameters of a loaded model.

    They are rounded to what they would be stored in, so that what is measured is what is stored.
    """

    def __init__(self, model: Any, tensors: Mapping[str, Described]) -> None:
        state: dict[str, Tensor] = model.state_dict()
        missing = [name for name in tensors if name not in state]
        if missing:
            raise ModelError(
                f"transformers stores {missing[0]} in a different form than the file",
                where=type(model).__name__,
                hint="the search needs models whose parameters match their files: no experts",
            )
        self.tensors = dict(tensors)
        self._state = state

    def write(self, name: str, start: int, values: Tensor, scratch: Scratch) -> None:
        """Take merged values of a parameter, from the entry `start` on."""
        rounded = values.reshape(-1).to(DTYPES[self.tensors[name].dtype])
        self._state[name].view(-1)[start : start + rounded.numel()].copy_(rounded)

    def raw(self, name: str, first: int, data: Tensor) -> None:
        """Whole-number buffers stay as they were loaded."""
