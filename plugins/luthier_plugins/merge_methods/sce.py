"""SCE: select, calculate, erase."""

from __future__ import annotations

import torch
from luthier.api import Context
from luthier.merging.api import Granularity, MergeMethod, MergePart, Scan
from luthier_plugins.merge_methods.config import SceConfig
from luthier_plugins.merge_methods.selection import Cut, largest
from luthier_plugins.merge_methods.sparsify import combine
from torch import Tensor


class Sce(MergeMethod[SceConfig]):
    """Keeps the entries in which the task vectors vary most, weighs the models by their kept energy, and leaves out
    what disagrees with the elected sign (Wan et al. 2024, arXiv:2408.07990, section 3.3).
    """

    granularity: Granularity = "statistics"

    def __init__(self, config: SceConfig, context: Context) -> None:
        super().__init__(config, context)
        self.density = config.density

    def measure(self, scan: Scan) -> tuple[Cut | None, list[float]]:
        density = scan.parameter.value(self.density)
        cut: Cut | None = None
        if density < 1:
            varied = int(scan(lambda part: (_variance(part)[0] > 0).sum()))
            ((cut,),) = largest(scan, _variance, [[int(varied * density)]])
        energies = scan(lambda part: torch.stack([delta.square().sum() for delta in _kept(part, cut)]).double())
        total = float(energies.sum())
        count = len(energies)
        return cut, [float(energy) / total if total > 0 else 1 / count for energy in energies]

    def merge(self, part: MergePart) -> Tensor:
        cut, weights = part.found
        kept = _kept(part, cut)
        # The signs are elected by the plain sum; the weights count in the mean.
        elected = torch.stack(kept).sum(dim=0).sign()
        agreeing = [(delta * elected).clamp_(min=0).mul_(elected) for delta in kept]
        return combine(part, agreeing, weights, consensus=True, normalize=True, scale=1.0)


def _variance(part: MergePart) -> list[Tensor]:
    return [torch.stack(part.deltas).var(dim=0, unbiased=False)]


def _kept(part: MergePart, cut: Cut | None) -> list[Tensor]:
    deltas = part.deltas
    if cut is None:
        return deltas
    mask = cut.holds(_variance(part)[0], part.start)
    return [delta.mul_(mask) for delta in deltas]
