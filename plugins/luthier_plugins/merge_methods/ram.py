"""Reinforced agent merging."""

from __future__ import annotations

import torch
from luthier.api import Context
from luthier.merging.api import Granularity, MergedParameter, MergeMethod, MergePart, Scan, leaves
from luthier_plugins.merge_methods.config import RamConfig
from torch import Tensor

TINY = 1e-12


class Ram(MergeMethod[RamConfig]):
    """Averages the entries that several models changed and takes over those that one changed (arXiv:2601.13572).

    RAM+ multiplies what only one model changed with 1 + r min(rho, alpha), rho the ratio of the model's shared to its
    own changes within the parameter.
    """

    granularity: Granularity = "statistics"

    def __init__(self, config: RamConfig, context: Context) -> None:
        super().__init__(config, context)
        self.config = config
        self.granularity = "statistics" if any(leaves(config.r)) else "elementwise"

    def measure(self, scan: Scan) -> Tensor:
        parameter = scan.parameter

        def counts(part: MergePart) -> Tensor:
            changed, sharing = self._changed(part.deltas, parameter)
            return torch.stack(
                [torch.stack([(own & (sharing > 1)).sum(), (own & (sharing == 1)).sum()]) for own in changed]
            )

        shared, own = scan(counts).double().unbind(dim=1)
        ratio = shared / own.clamp(min=max(parameter.value(self.config.threshold), TINY))
        return 1 + parameter.value(self.config.r) * ratio.clamp(0, parameter.value(self.config.alpha))

    def merge(self, part: MergePart) -> Tensor:
        assert part.base is not None, "ram requires a base in its config"
        deltas = part.deltas
        changed, sharing = self._changed(deltas, part.parameter)
        strength = [1.0] * len(deltas) if part.found is None else part.found.tolist()
        total = torch.zeros_like(part.base)
        for delta, own, factor in zip(deltas, changed, strength, strict=True):
            total += delta * own * torch.where(sharing == 1, factor, 1 / sharing.clamp(min=1))
        return total.add_(part.base)

    def _changed(self, deltas: list[Tensor], parameter: MergedParameter) -> tuple[list[Tensor], Tensor]:
        threshold = parameter.value(self.config.threshold)
        changed = [delta.abs() > threshold for delta in deltas]
        return changed, torch.stack(changed).sum(dim=0)
