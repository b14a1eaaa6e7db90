"""How a merge method is run on a parameter: in parts of whole rows, always the same ones, for any number of workers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.merging.api import MergedParameter, MergeMethod, MergePart, Scan

BLOCK = 1 << 19
"""Entries in a part, at most, unless one row has more: small enough for a core's cache, and large enough that threads
do not wait for each other's Python between parts."""
PHILOX_NUMBERS = 16
"""Philox gives 256 bits for each count: 16 numbers of 16 bits."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A parameter's shape as rows and columns, and the parts it is worked on in."""

    rows: int
    columns: int

    @classmethod
    def of(cls, shape: Sequence[int]) -> Grid:
        """A vector is one row; what has more than two dimensions is the rows of all its matrices."""
        return cls(math.prod(shape[:-1]), shape[-1] if shape else 1)

    @property
    def height(self) -> int:
        """Rows in a part; depends on the shape alone, so that workers and memory do not change results."""
        return max(1, BLOCK // max(1, self.columns))

    def spans(self, parts: int = 1) -> Iterator[tuple[int, int]]:
        """The first row of each part, or of so many parts at once, and the row after its last."""
        for first in range(0, self.rows if self.columns else 0, parts * self.height):
            yield first, min(first + parts * self.height, self.rows)


class Noise:
    """Uniform random numbers by count, not by sequence: Philox4x64 (Salmon et al. 2011) in numpy.

    A number is the middle of one of 65536 equal steps of [0, 1): it is below a probability p with the next multiple of
    1/65536, which is p to within 0.000008, in half the time that numbers of 32 bits take.

    Args:
        seed: The recipe's seed.
        contents: What identifies each model's content, such as a digest of its weights.
        name: The parameter.
    """

    def __init__(self, seed: int, contents: Sequence[str], name: str) -> None:
        texts = [f"{seed}\0{content}\0{name}" for content in contents]
        self._keys = [np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], dtype=np.uint64) for text in texts]

    def __call__(self, model: int, start: int, count: int) -> Tensor:
        """The numbers of the entries from `start` on, float32, shape (count,)."""
        counter, ahead = divmod(start, PHILOX_NUMBERS)
        raw = np.random.Philox(key=self._keys[model], counter=counter).random_raw(-(-(ahead + count) // 4))
        steps = torch.from_numpy(raw.view(np.int16))[ahead : ahead + count]
        return steps.float().add_(32768.5).mul_(1 / 65536)


@dataclass(frozen=True, slots=True)
class TensorScan:
    """A `Scan` over the parts that `parts` yields."""

    parameter: MergedParameter
    weights: Sequence[float]
    parts: Callable[[], Iterator[MergePart]]
    on_gpu: bool = False

    def __call__(self, function: Callable[[MergePart], Tensor]) -> Tensor:
        return in_order(function(part) for part in self.parts())

    def each(self, function: Callable[[MergePart], Tensor], every: int = 1) -> list[Tensor]:
        """What `function` returns for each part, or for every so many-th of them."""
        return [function(part) for part in islice(self.parts(), 0, None, every)]


def in_order(values: Iterator[Tensor]) -> Tensor:
    """The sum of tensors, added up one after the other."""
    total = next(values).clone()
    for value in values:
        total += value
    return total


def merge_tensors(
    method: MergeMethod[Any],
    tensors: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    base: Tensor | None = None,
    *,
    name: str = "tensor",
    depth: float = 0.0,
    extras: Sequence[Tensor] = (),
    noise: Noise | None = None,
) -> Tensor:
    """Merge one parameter in memory.

    Args:
        method: A merge method.
        tensors: The parameter of each model, float32, all of one shape.
        weights: The models' weights; 1 by default.
        base: The parameter of the base model.
        name: Its name.
        depth: How deep in the model it is, from 0 to 1.
        extras: What the method's `prepare` made of each model for this parameter.
        noise: Random numbers for methods that draw some.

    Returns:
        The merged parameter, float32, of the same shape.
    """
    shape = tuple(tensors[0].shape)
    if 0 in shape:
        return torch.empty(shape)
    parameter = MergedParameter(name, shape, depth, len(tensors))
    given = list(weights or [1.0] * len(tensors))
    draw = noise or Noise(0, [str(index) for index in range(len(tensors))], name)
    if method.granularity == "matrix":
        return method.merge(MergePart(parameter, 0, tensors, given, base, None, extras, draw))
    grid = Grid.of(shape)
    flat = [tensor.reshape(grid.rows, grid.columns) for tensor in tensors]
    flat_base = None if base is None else base.reshape(grid.rows, grid.columns)
    flat_extras = [extra.reshape(grid.rows, grid.columns) for extra in extras]

    def parts(found: Any = None) -> Iterator[MergePart]:
        for first, last in grid.spans():
            yield MergePart(
                parameter,
                first * grid.columns,
                [tensor[first:last] for tensor in flat],
                given,
                None if flat_base is None else flat_base[first:last],
                found,
                [extra[first:last] for extra in flat_extras],
                draw,
            )

    found = measured(method, TensorScan(parameter, given, parts))
    merged = [method.merge(part) for part in parts(found)]
    return torch.cat(merged).reshape(shape) if merged else torch.empty(shape)


def measured(method: MergeMethod[Any], scan: Scan) -> Any:
    """What a method finds in the whole parameter; None when it needs nothing."""
    if method.granularity != "statistics" or 0 in scan.parameter.shape:
        return None
    return method.measure(scan)
