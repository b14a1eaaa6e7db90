"""Task arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from luthier_plugins.merge_methods.config import TaskArithmeticConfig
from torch import Tensor


class TaskArithmetic:
    """base + scale * sum_i w_i (theta_i - base) (Ilharco et al. 2022, arXiv:2212.04089, section 2)."""

    needs_base: ClassVar[bool] = True

    def __init__(self, config: TaskArithmeticConfig) -> None:
        self.scale = config.scale

    def merge(self, tensors: Sequence[Tensor], weights: Sequence[float], base: Tensor | None) -> Tensor:
        assert base is not None, "the merge stage gives the base to methods that need it"
        merged = base.clone()
        for tensor, weight in zip(tensors, weights, strict=True):
            merged += torch.sub(tensor, base) * (self.scale * weight)
        return merged
