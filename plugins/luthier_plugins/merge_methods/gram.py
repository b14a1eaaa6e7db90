"""Inner products over a whole parameter: what interpolation on a sphere needs to know of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from luthier.merging.api import MergePart, Scan
from torch import Tensor

Vectors = Callable[[MergePart], Sequence[Tensor]]


def models_of(part: MergePart) -> Sequence[Tensor]:
    """The models as they are."""
    return part.tensors


def from_base(part: MergePart) -> Sequence[Tensor]:
    """Task vectors where there is a base, else the models as they are."""
    return part.tensors if part.base is None else part.deltas


def gram(scan: Scan, vectors: Vectors) -> Tensor:
    """The inner products of all pairs of flattened vectors, float64, shape (models, models)."""

    def products(part: MergePart) -> Tensor:
        found = vectors(part)
        result = torch.empty(len(found), len(found), dtype=torch.float64)
        for row, left in enumerate(found):
            for column, right in enumerate(found[: row + 1]):
                result[row, column] = result[column, row] = (left * right).sum(dtype=torch.float32).double()
        return result

    return scan(products)


def combined(part: MergePart, vectors: Vectors, coefficients: Tensor) -> Tensor:
    """The linear combination of a part's vectors, on top of the base when they are task vectors."""
    found = vectors(part)
    merged = found[0] * float(coefficients[0])
    for vector, coefficient in zip(found[1:], coefficients[1:], strict=True):
        merged.add_(vector, alpha=float(coefficient))
    return merged if found is part.tensors or part.base is None else merged.add_(part.base)
