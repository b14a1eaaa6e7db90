"""The tensors of a merged model as jobs: what each is made of, and how its parts are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from luthier.artifacts.tensors import safetensors_header
from luthier.merging.api import MergedParameter, MergeMethod, MergePart, Scan
from luthier.merging.files import Files, Scratch
from luthier.merging.parts import Grid, Noise, in_order
from luthier.merging.reader import Source

Span = tuple[int, int]
PartFunction = Callable[[MergePart], Tensor]
Walk = Callable[[PartFunction, int, bool], Iterator[Tensor]]
"""Gives what the function returns for every so many-th part; whole numbers may be added up when the flag says so."""


@dataclass(frozen=True, slots=True)
class Operand:
    """Where one model's part in a parameter comes from, and what it is multiplied with."""

    weights: Source
    name: str
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class TensorJob:
    """One tensor of the merged model.

    Attributes:
        parameter: What it is.
        operands: Where it comes from, a operand a model; one operand and no method: it is copied as it is.
        base: Where the base's part comes from.
        numbers: The models' weights for it.
        noise: The random numbers of this tensor.
        slice: The slice it is of, by place.
        method: How it is merged, where not as the others are.
    """

    parameter: MergedParameter
    operands: Sequence[Operand]
    base: Operand | None = None
    numbers: Sequence[float] = ()
    noise: Noise | None = None
    extras: Sequence[tuple[Files, str]] = ()
    copied: bool = False
    slice: int | None = None
    method: MergeMethod[Any] | None = None

    @property
    def entries(self) -> int:
        return math.prod(self.parameter.shape)


class Extras:
    """Finds what a method has prepared for a parameter: from every model, or nothing.

    Args:
        prepared: For each model, the file of each parameter.
    """

    def __init__(self, prepared: Sequence[Mapping[str, Path]]) -> None:
        self._prepared = prepared
        self._opened: dict[Path, Files] = {}

    def of(self, name: str) -> list[tuple[Files, str]]:
        """The files of a parameter, opened, and its name in them."""
        if not self._prepared or not all(name in files for files in self._prepared):
            return []
        return [(self._open(files[name]), name) for files in self._prepared]

    def close(self) -> None:
        """Close the files."""
        for files in self._opened.values():
            files.close()
        self._opened.clear()

    def _open(self, path: Path) -> Files:
        if path not in self._opened:
            self._opened[path] = Files(path.parent, safetensors_header(path))
        return self._opened[path]


def read_part(job: TensorJob, span: Span, scratch: Scratch, *, whole: bool = False) -> MergePart:
    """Read a part into scratch buffers: it is valid until the next one is read there.

    Args:
        whole: Leave out what the method has prepared: a method on whole matrices reads it in its own shape.
    """
    columns = Grid.of(job.parameter.shape).columns
    rows, start = span[1] - span[0], span[0] * columns
    inputs: list[Tensor] = []
    for operand in [*job.operands, *([job.base] if job.base else [])]:
        buffer = scratch.floats(len(inputs), rows * columns).view(rows, columns)
        operand.weights.read(operand.name, start, buffer, scratch)
        if operand.scale != 1.0:
            buffer.mul_(operand.scale)
        inputs.append(buffer)
    extras: list[Tensor] = []
    for files, name in () if whole else job.extras:
        buffer = scratch.floats(len(inputs) + len(extras), rows * columns)
        files.floats(name, start, buffer, scratch)
        extras.append(buffer.view(rows, columns))
    base = inputs.pop() if job.base else None
    return MergePart(job.parameter, start, inputs, job.numbers, base, None, extras, job.noise)


def scan_of(job: TensorJob) -> Scan:
    """A walk over one parameter in this thread."""
    scratch = Scratch()
    spans = list(Grid.of(job.parameter.shape).spans())
    return ScanOf(job, lambda function, every, _: (function(read_part(job, span, scratch)) for span in spans[::every]))


class ScanOf:
    """A `luthier.merging.api.Scan` over what `walk` gives."""

    def __init__(self, job: TensorJob, walk: Walk, *, on_gpu: bool = False) -> None:
        self.parameter = job.parameter
        self.weights = job.numbers
        self.on_gpu = on_gpu
        self._walk = walk

    def __call__(self, function: PartFunction) -> Tensor:
        return in_order(self._walk(function, 1, True))

    def each(self, function: PartFunction, every: int = 1) -> list[Tensor]:
        return list(self._walk(function, every, False))
