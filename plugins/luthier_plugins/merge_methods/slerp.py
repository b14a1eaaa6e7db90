"""Spherical linear interpolation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from luthier.api import ModelError
from luthier_plugins.merge_methods.config import SlerpConfig
from torch import Tensor

COLLINEAR = 1 - 5e-4
"""Cosine beyond which the great circle is not defined well enough, and a straight line is used."""


class Slerp:
    """sin((1-t)W)/sin(W) a + sin(tW)/sin(W) b, W the angle between a and b (Shoemake 1985).

    The angle is that of the flattened tensors; collinear tensors are interpolated linearly.
    """

    needs_base: ClassVar[bool] = False

    def __init__(self, config: SlerpConfig) -> None:
        self.t = config.t

    def merge(self, tensors: Sequence[Tensor], weights: Sequence[float], base: Tensor | None) -> Tensor:
        if len(tensors) != 2:
            raise ModelError(f"slerp takes two models, not {len(tensors)}", hint="use linear or ties for more")
        a, b = tensors
        if self.t in (0.0, 1.0):
            return (b if self.t else a).clone()
        norms = a.norm().double() * b.norm().double()
        cosine = float((a.flatten().double() @ b.flatten().double()) / norms) if norms > 0 else 1.0
        if abs(cosine) > COLLINEAR:
            return torch.lerp(a, b, self.t)
        angle = torch.acos(torch.tensor(cosine, dtype=torch.float64))
        left = float(torch.sin((1 - self.t) * angle) / torch.sin(angle))
        right = float(torch.sin(self.t * angle) / torch.sin(angle))
        return left * a + right * b
