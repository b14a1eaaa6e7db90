"""Weighted average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from luthier_plugins.merge_methods.config import LinearConfig
from torch import Tensor


class Linear:
    """theta = sum_i w_i theta_i, over sum_i w_i when normalized (Wortsman et al. 2022, arXiv:2203.05482)."""

    needs_base: ClassVar[bool] = False

    def __init__(self, config: LinearConfig) -> None:
        self.normalize = config.normalize

    def merge(self, tensors: Sequence[Tensor], weights: Sequence[float], base: Tensor | None) -> Tensor:
        first = tensors[0]
        # Added up as differences to the first model, so that merging equal models changes no bit.
        total = sum(weights)
        scale = 1 / total if self.normalize else 1.0
        merged = first.clone() if self.normalize else first * total
        for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
            merged += torch.sub(tensor, first) * (weight * scale)
        return merged
