"""Spherical linear interpolation of two models."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from luthier.api import Context
from luthier.merging.api import Granularity, MergeMethod, MergePart, Scan
from luthier_plugins.merge_methods.config import NuslerpConfig, SlerpConfig
from luthier_plugins.merge_methods.gram import combined, from_base, gram, models_of
from torch import Tensor

COLLINEAR = 0.9995
"""Cosine beyond which the great circle is not defined well enough, and a straight line is used."""
TINY = 1e-16


def shares(cosine: float, t: float, collinear: float = COLLINEAR) -> tuple[float, float]:
    """What each of two vectors at an angle contributes at `t` (Shoemake 1985)."""
    if abs(cosine) > collinear:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def cosine_of(products: Tensor) -> float:
    """The cosine of the angle between two vectors, from their inner products; 1 where one of them is zero."""
    size = math.sqrt(float(products[0, 0]) * float(products[1, 1]))
    return max(-1.0, min(1.0, float(products[0, 1]) / size)) if size > 0 else 1.0


class Slerp(MergeMethod[SlerpConfig]):
    """sin((1-t)W)/sin(W) a + sin(tW)/sin(W) b, W the angle between a and b (Shoemake 1985).

    The angle is that of the flattened parameters; collinear ones are interpolated linearly.
    """

    granularity: Granularity = "statistics"

    def __init__(self, config: SlerpConfig, context: Context) -> None:
        super().__init__(config, context)
        self.t = config.t

    def measure(self, scan: Scan) -> tuple[float, float]:
        t = scan.parameter.value(self.t)
        return (1 - t, t) if t in (0.0, 1.0) else shares(cosine_of(gram(scan, models_of)), t)

    def merge(self, part: MergePart) -> Tensor:
        a, b = part.tensors
        left, right = part.found
        if right == 0.0:
            return a.clone()
        # Around the first model when the line is straight, so that merging equal models changes no bit.
        return torch.lerp(a, b, right) if left + right == 1 else torch.add(a * left, b, alpha=right)


class Nuslerp(MergeMethod[NuslerpConfig]):
    """SLERP (Shoemake 1985) with t = w_2 / (w_1 + w_2), between task vectors where there is a base; by rows unless
    flattened.
    """

    granularity: Granularity = "statistics"

    def __init__(self, config: NuslerpConfig, context: Context) -> None:
        super().__init__(config, context)
        self.granularity = "statistics" if config.flatten else "elementwise"

    def measure(self, scan: Scan) -> Tensor:
        shares_ = shares(cosine_of(gram(scan, from_base)), _t(scan.weights), 1 - TINY)
        return torch.tensor(shares_, dtype=torch.float64)

    def merge(self, part: MergePart) -> Tensor:
        if self.granularity == "statistics":
            return combined(part, from_base, part.found)
        a, b = from_base(part)
        t = _t(part.weights)
        sizes = a.norm(dim=1, keepdim=True).double() * b.norm(dim=1, keepdim=True).double()
        cosine = ((a * b).sum(dim=1, keepdim=True).double() / sizes.clamp(min=TINY)).clamp(-1, 1)
        straight = (1 - cosine.square() <= TINY) | (sizes <= TINY)
        angle = torch.acos(torch.where(straight, 0.0, cosine))
        left = torch.where(straight, 1 - t, torch.sin((1 - t) * angle) / torch.sin(angle)).float()
        right = torch.where(straight, t, torch.sin(t * angle) / torch.sin(angle)).float()
        merged = left * a + right * b
        return merged if part.base is None else merged.add_(part.base)


def _t(weights: Sequence[float]) -> float:
    return weights[1] / sum(weights)
