"""TIES: trim, elect signs, merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from luthier_plugins.merge_methods.config import TiesConfig
from torch import Tensor


class Ties:
    """Yadav et al. 2023, arXiv:2306.01708, sections 3.1 to 3.3.

    Each task vector (model minus base) keeps its `density` largest entries; per entry, the sign with the
    larger weighted mass wins; the weighted mean of the entries that have it is added to the base.
    """

    needs_base: ClassVar[bool] = True

    def __init__(self, config: TiesConfig) -> None:
        self.density = config.density
        self.normalize = config.normalize

    def merge(self, tensors: Sequence[Tensor], weights: Sequence[float], base: Tensor | None) -> Tensor:
        assert base is not None, "the merge stage gives the base to methods that need it"
        deltas = [weight * trim(tensor - base, self.density) for tensor, weight in zip(tensors, weights, strict=True)]
        majority = torch.sign(torch.stack(deltas).sum(dim=0))
        total = torch.zeros_like(base)
        mass = torch.zeros_like(base)
        for delta, weight in zip(deltas, weights, strict=True):
            agrees = (torch.sign(delta) == majority) & (delta != 0)
            total += torch.where(agrees, delta, 0.0)
            mass += agrees * weight
        if self.normalize:
            total = torch.where(mass > 0, total / mass, 0.0)
        return base + total


def trim(delta: Tensor, density: float) -> Tensor:
    """Zero all but the round(density * n) largest entries by magnitude; ties go to the lowest index."""
    keep = round(density * delta.numel())
    if keep >= delta.numel():
        return delta
    if keep == 0:
        return torch.zeros_like(delta)
    size = delta.abs().flatten()
    threshold = size.kthvalue(delta.numel() - keep + 1).values
    kept = size > threshold
    at_threshold = (size == threshold).nonzero().flatten()[: keep - int(kept.sum())]
    kept[at_threshold] = True
    return (delta.flatten() * kept).view_as(delta)
