"""Which entries of a task vector are kept: what TIES, DARE, DELLA and model breadcrumbs differ in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from luthier.api import ModelError
from luthier.merging.api import MergePart, Scan
from luthier_plugins.merge_methods.selection import Cut, largest
from torch import Tensor

SMALLEST = torch.finfo(torch.float32).tiny
"""What an entry without any mass is divided by."""


def kept_entries(share: float, entries: int) -> int:
    """How many entries a share is; a share above 0 is one entry at least."""
    return min(entries, max(_floor(share * entries), 1 if share > 0 else 0))


def _floor(value: float) -> int:
    """The whole number below; what floating point makes of a whole number is that number."""
    return int(value + 1e-6)


def magnitudes(part: MergePart) -> list[Tensor]:
    """The sizes of the task vectors' entries."""
    return [delta.abs_() for delta in part.deltas]


def magnitude_cuts(scan: Scan, densities: Sequence[float], gammas: Sequence[float]) -> list[tuple[Cut, Cut]]:
    """For each model: the entries too large to keep (a share gamma), and those with what is kept after them."""
    entries = 1
    for size in scan.parameter.shape:
        entries *= size
    counts: list[tuple[int, int]] = []
    for density, gamma in zip(densities, gammas, strict=True):
        keep = kept_entries(density, entries)
        # Fewer outliers go where there would not be enough entries left.
        outliers = min(_floor(gamma * entries), entries - keep)
        counts.append((outliers, outliers + keep))
    return [(top, both) for top, both in largest(scan, magnitudes, counts)]


def by_magnitude(delta: Tensor, cuts: tuple[Cut, Cut], start: int) -> Tensor:
    """The entries after the first cut and before the second; the others become 0."""
    top, both = cuts
    drops = bool(top.start or top.more)
    if both.whole(start) and not drops:
        # What is not larger than the number below the cut becomes 0, in one pass.
        return torch.hardshrink(delta, both.below)
    size = delta.abs()
    outliers = top.holds(size.clone(), start) if drops else None
    mask = both.holds(size, start)
    if outliers is not None:
        mask.sub_(outliers)
    return mask.mul_(delta)


def by_chance(part: MergePart, model: int, delta: Tensor, density: float, rescale: bool) -> Tensor:
    """Keep each entry with the probability `density` (DARE: Yu et al. 2023, arXiv:2311.03099, section 3.2).

    Rescaled by 1 / density, the expectation is the task vector itself.
    """
    if density >= 1:
        return delta
    if density <= 0:
        return torch.zeros_like(delta)
    kept = part.uniform(model).lt_(density).mul_(delta)
    return kept.div_(_exact(density, kept)) if rescale else kept


def by_rank_and_chance(
    part: MergePart, model: int, delta: Tensor, density: float, epsilon: float, rescale: bool
) -> Tensor:
    """Keep an entry the likelier, the larger it is within its row (DELLA: Deep et al. 2024, arXiv:2406.11617,
    equations 1 to 3): from density - epsilon for the smallest to density + epsilon for the largest.

    Rescaled by 1 / its probability, each entry's expectation is the entry itself.
    """
    if density >= 1:
        return delta
    if density <= 0:
        return torch.zeros_like(delta)
    if density - epsilon <= 0 or density + epsilon >= 1:
        raise ModelError(
            f"della draws with probabilities from {density - epsilon:g} to {density + epsilon:g}",
            where=part.parameter.name,
            hint="choose `density` and `epsilon` so that density - epsilon > 0 and density + epsilon < 1",
        )
    order = delta.abs().argsort(dim=1, stable=True)
    width = delta.shape[1]
    steps = (torch.arange(width, dtype=torch.float32) / max(1, width - 1)).to(delta.device)
    chance = torch.empty_like(delta).scatter_(1, order, steps.expand_as(delta).contiguous())
    chance.mul_(2 * epsilon).add_(density - epsilon)
    kept = part.uniform(model).lt_(chance).mul_(delta)
    return kept.div_(chance) if rescale else kept


def combine(
    part: MergePart, deltas: Sequence[Tensor], weights: Sequence[float], *, consensus: bool, normalize: bool, scale: Any
) -> Tensor:
    """base + scale * the weighted sum of sparse task vectors.

    Args:
        consensus: Per entry, leave out what disagrees with the sign that has the larger weighted mass (TIES).
        normalize: Divide by the sum of the weights that took part, entry by entry with `consensus`.
    """
    assert part.base is not None, "methods that merge task vectors require a base in their config"
    # Nothing else uses the sparse task vectors: they may be changed in place.
    weighted = [delta if weight == 1 else delta.mul_(weight) for delta, weight in zip(deltas, weights, strict=True)]
    total = weighted[0].clone()
    for delta in weighted[1:]:
        total += delta
    if consensus:
        elected = total.sign_()
        # Above zero where the sign is the elected one, and neither is zero.
        along = [delta.mul_(elected).relu_() for delta in weighted]
        total = along[0].clone()
        for delta in along[1:]:
            total += delta
        total.mul_(elected)
        if normalize:
            mass = along[0].sign_().mul_(weights[0])
            for delta, weight in zip(along[1:], weights[1:], strict=True):
                mass.add_(delta.sign_(), alpha=weight)
            # Where nothing agrees, 0 / 1.
            total.div_(mass.clamp_(min=SMALLEST) if min(weights) > 0 else mass.add_(mass.clone().eq_(0)))
    elif normalize:
        # All of them 0: nothing changes.
        total.div_(_exact(sum(weights) or 1.0, total))
    return (total if scale == 1 else total.mul_(scale)).add_(part.base)


def _exact(divisor: float, like: Tensor) -> Tensor:
    """A number to divide by: a GPU multiplies with the inverse of a plain one, which rounds otherwise."""
    return torch.tensor(divisor, dtype=like.dtype, device=like.device)
