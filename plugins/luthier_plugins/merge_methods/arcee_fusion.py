"""The merge method ``arcee_fusion``."""

from __future__ import annotations

import torch
from luthier.merging.api import Granularity, MergeMethod, MergePart, Scan
from luthier_plugins.merge_methods.config import ArceeFusionConfig
from luthier_plugins.merge_methods.selection import largest
from torch import Tensor

TINY = 1e-8


class ArceeFusion(MergeMethod[ArceeFusionConfig]):
    """Takes over the entries whose importance is an outlier, base elsewhere (Arcee 2024, MergeKit 0.1's Arcee Fusion).

    An entry's importance is |theta - base| times the divergence KL(softmax(theta) || softmax(base)) of its row; it is
    an outlier from the median plus 1.5 times the interquartile range on, of all the parameter's importances.
    """

    granularity: Granularity = "statistics"

    def measure(self, scan: Scan) -> float:
        entries = 1
        for size in scan.parameter.shape:
            entries *= size
        ranks = [entries - int(quarter / 4 * (entries - 1)) for quarter in (1, 2, 3)]
        (cuts,) = largest(scan, lambda part: [_importance(part)], [ranks])
        first, median, third = (cut.value for cut in cuts)
        return median + 1.5 * (third - first)

    def merge(self, part: MergePart) -> Tensor:
        assert part.base is not None, "arcee_fusion requires a base in its config"
        return part.deltas[0].mul_(_importance(part) >= part.found).add_(part.base)


def _importance(part: MergePart) -> Tensor:
    assert part.base is not None, "arcee_fusion requires a base in its config"
    p = torch.softmax(part.tensors[0], dim=1) + TINY
    q = torch.softmax(part.base, dim=1) + TINY
    # Rounding makes the divergence of equal rows a little negative.
    return part.deltas[0].abs_().mul_((p * torch.log(p / q)).sum(dim=1, keepdim=True).clamp_(min=0.0))
