"""Means of any number of models on a sphere.

Both stay in the span of the models, so they are computed on coefficients, with the models' inner products.
"""

from __future__ import annotations

import math

import torch
from luthier.api import Context, ModelError
from luthier.merging.api import Granularity, MergeMethod, MergePart, Scan
from luthier_plugins.merge_methods.config import KarcherConfig, MultislerpConfig
from luthier_plugins.merge_methods.gram import combined, from_base, gram, models_of
from torch import Tensor

TINY = 1e-8


class Multislerp(MergeMethod[MultislerpConfig]):
    """Maps the models' directions to the tangent space at their weighted mean, averages there, maps back (Goddard
    2024, "Multi-SLERP"); the length is the weighted mean of the lengths. With a base, of task vectors.
    """

    granularity: Granularity = "statistics"

    def __init__(self, config: MultislerpConfig, context: Context) -> None:
        super().__init__(config, context)
        self.normalize = config.normalize

    def measure(self, scan: Scan) -> Tensor:
        products = gram(scan, from_base)
        weights = torch.tensor(scan.weights, dtype=torch.float64)
        if self.normalize:
            weights = weights / weights.sum()
        if len(weights) == 1:
            return torch.ones(1, dtype=torch.float64)
        # Nothing was changed, as in the embeddings of models with adapters.
        if not bool(products.any()):
            return weights
        lengths = products.diagonal().sqrt()
        cosines = products / (lengths + TINY).outer(lengths + TINY)
        size = float(torch.sqrt((weights @ cosines @ weights).clamp(min=0)))
        if size < TINY:
            if len(weights) == 2:
                return weights
            raise ModelError(
                "the models' weighted directions cancel each other out",
                where=scan.parameter.name,
                hint="give them other weights, or leave one out",
            )
        mean = weights / size
        # The weighted sum of the directions' parts that are orthogonal to the mean.
        tangent = weights - (weights @ (cosines @ mean)) * mean
        angle = float(torch.sqrt((tangent @ cosines @ tangent).clamp(min=0))) + TINY
        result = mean * math.cos(angle) + tangent * (math.sin(angle) / angle)
        return result * (lengths * weights).sum() / (lengths + TINY)

    def merge(self, part: MergePart) -> Tensor:
        return combined(part, from_base, part.found)


class Karcher(MergeMethod[KarcherConfig]):
    """The point on the sphere with the least weighted sum of squared angles to the models' directions, by
    Riemannian gradient descent (Karcher 1977); the length is the weighted mean of the lengths.
    """

    granularity: Granularity = "statistics"

    def __init__(self, config: KarcherConfig, context: Context) -> None:
        super().__init__(config, context)
        self.steps = config.steps
        self.tolerance = config.tolerance

    def measure(self, scan: Scan) -> Tensor:
        tolerance = scan.parameter.value(self.tolerance)
        products = gram(scan, models_of)
        weights = torch.tensor(scan.weights, dtype=torch.float64)
        weights = weights / weights.sum()
        lengths = products.diagonal().sqrt()
        found = lengths > tolerance
        if not bool(found.any()):
            return torch.zeros_like(weights)
        sizes = torch.where(found, lengths, 1.0)
        cosines = products / sizes.outer(sizes)
        shares = torch.where(found, weights, 0.0)
        mean = self._mean(cosines, shares / shares.sum(), int(found.nonzero()[0, 0]), tolerance)
        return mean / sizes * (weights * lengths).sum()

    def _mean(self, cosines: Tensor, shares: Tensor, first: int, tolerance: float) -> Tensor:
        def unit(vector: Tensor) -> Tensor:
            return vector / torch.sqrt(vector @ cosines @ vector)

        start = torch.zeros_like(shares)
        start[first] = 1.0
        size = float(torch.sqrt((shares @ cosines @ shares).clamp(min=0)))
        mean = unit(shares) if size >= tolerance else start
        for _ in range(self.steps):
            near = (cosines @ mean).clamp(-1, 1)
            angles = torch.acos(near)
            pull = torch.where(angles < tolerance, 0.0, shares * angles / torch.sin(angles).clamp(min=1e-30))
            tangent = pull - (pull @ near) * mean
            move = float(torch.sqrt((tangent @ cosines @ tangent).clamp(min=0)))
            if move < tolerance:
                break
            mean = unit(math.cos(move) * mean + math.sin(move) / move * tangent)
        return mean

    def merge(self, part: MergePart) -> Tensor:
        return combined(part, models_of, part.found)
