"""Model stock."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import ClassVar

import torch
from luthier.api import ModelError
from luthier_plugins.merge_methods.config import ModelStockConfig
from torch import Tensor
from torch.nn.functional import cosine_similarity

SINGULAR = 1e-6


class ModelStock:
    """t * mean_i theta_i + (1 - t) * base, with t = k cos / (1 + (k - 1) cos) for k models whose task vectors
    are at the mean angle arccos(cos) to each other (Jang et al. 2024, arXiv:2403.19522, equation 2).

    The angle of a parameter is that of its entries as one vector. The models count alike.
    """

    needs_base: ClassVar[bool] = True

    def __init__(self, config: ModelStockConfig) -> None: ...

    def merge(self, tensors: Sequence[Tensor], weights: Sequence[float], base: Tensor | None) -> Tensor:
        assert base is not None, "the merge stage gives the base to methods that need it"
        if len(set(weights)) > 1:
            raise ModelError("model_stock weighs its models by their angles", hint="leave `weights` out")
        count = len(tensors)
        deltas = [torch.sub(tensor, base) for tensor in tensors]
        pairs = [cosine_similarity(a.flatten(), b.flatten(), dim=0) for a, b in combinations(deltas, 2)]
        cosine = torch.stack(pairs).mean()
        bottom = 1 + (count - 1) * cosine
        # Task vectors that cancel each other out leave nothing but the base.
        share = count * cosine / bottom if abs(float(bottom)) > SINGULAR else torch.zeros(())
        return base + share * torch.stack(deltas).mean(dim=0)
