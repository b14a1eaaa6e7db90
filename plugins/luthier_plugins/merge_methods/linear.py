"""Weighted average."""

from __future__ import annotations

import torch
from luthier.api import Context
from luthier.merging.api import Granularity, MergeMethod, MergePart
from luthier_plugins.merge_methods.config import LinearConfig
from torch import Tensor


class Linear(MergeMethod[LinearConfig]):
    """theta = sum_i w_i theta_i, over sum_i w_i when normalized (Wortsman et al. 2022, arXiv:2203.05482)."""

    granularity: Granularity = "elementwise"

    def __init__(self, config: LinearConfig, context: Context) -> None:
        super().__init__(config, context)
        self.normalize = config.normalize

    def merge(self, part: MergePart) -> Tensor:
        first = part.tensors[0]
        total = sum(part.weights)
        # Added up as differences to the first model, so that merging equal models changes no bit.
        merged = first if self.normalize else first * total
        for tensor, weight in zip(part.tensors[1:], part.weights[1:], strict=True):
            change, share = tensor.sub(first), weight / total if self.normalize else weight
            merged = torch.add(merged, change, alpha=share, out=change)
        return merged
