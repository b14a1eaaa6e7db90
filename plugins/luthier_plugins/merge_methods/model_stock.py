"""Model stock."""

from __future__ import annotations

from itertools import combinations

import torch
from luthier.api import Context
from luthier.merging.api import Granularity, MergeMethod, MergePart, Scan
from luthier_plugins.merge_methods.config import ModelStockConfig
from luthier_plugins.merge_methods.gram import from_base, gram
from torch import Tensor

SINGULAR = 1e-6


class ModelStock(MergeMethod[ModelStockConfig]):
    """t * mean_i theta_i + (1 - t) * base, with t = k cos / (1 + (k - 1) cos) for k models whose task vectors
    are at the mean angle arccos(cos) to each other (Jang et al. 2024, arXiv:2403.19522, equation 2).

    The angle is that of whole parameters, or of each row. Where the models cancel each other out, the base is left.
    """

    granularity: Granularity = "statistics"

    def __init__(self, config: ModelStockConfig, context: Context) -> None:
        super().__init__(config, context)
        self.granularity = "elementwise" if config.filter_wise else "statistics"

    def measure(self, scan: Scan) -> Tensor:
        products = gram(scan, from_base)
        sizes = products.diagonal().sqrt()
        norms = sizes.outer(sizes)
        cosines = torch.where(norms > 0, products / torch.where(norms > 0, norms, 1.0), 0.0).clamp(-1, 1)
        count = len(sizes)
        return _share(torch.stack([cosines[a, b] for a, b in combinations(range(count), 2)]).mean(), count)

    def merge(self, part: MergePart) -> Tensor:
        assert part.base is not None, "model_stock requires a base in its config"
        deltas = part.deltas
        share = part.found if self.granularity == "statistics" else self._by_rows(deltas)
        total = deltas[0]
        for delta in deltas[1:]:
            total.add_(delta)
        return total.mul_(share.float() / len(deltas)).add_(part.base)

    def _by_rows(self, deltas: list[Tensor]) -> Tensor:
        pairs = list(combinations(deltas, 2))
        norms = [a.norm(dim=1).double() * b.norm(dim=1).double() for a, b in pairs]
        cosines = [
            torch.where(norm > 0, (a * b).sum(dim=1).double() / torch.where(norm > 0, norm, 1.0), 0.0).clamp(-1, 1)
            for (a, b), norm in zip(pairs, norms, strict=True)
        ]
        return _share(torch.stack(cosines).mean(dim=0), len(deltas))[:, None]


def _share(cosine: Tensor, count: int) -> Tensor:
    bottom = 1 + (count - 1) * cosine
    singular = bottom.abs() < SINGULAR
    return torch.where(singular, 0.0, count * cosine / torch.where(singular, 1.0, bottom))
