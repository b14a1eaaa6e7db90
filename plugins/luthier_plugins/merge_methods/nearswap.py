"""The merge method ``nearswap``."""

from __future__ import annotations

from luthier.api import Context
from luthier.merging.api import Granularity, MergeMethod, MergePart
from luthier_plugins.merge_methods.config import NearswapConfig
from torch import Tensor


class Nearswap(MergeMethod[NearswapConfig]):
    """base + sign(d) min(|d|, t) for d = theta - base (alchemonaut 2024, model card of QuartetAnemoi-70B-t0.0001)."""

    granularity: Granularity = "elementwise"

    def __init__(self, config: NearswapConfig, context: Context) -> None:
        super().__init__(config, context)
        self.t = config.t

    def merge(self, part: MergePart) -> Tensor:
        assert part.base is not None, "nearswap requires a base in its config"
        t = part.parameter.value(self.t)
        return part.deltas[0].clamp_(-t, t).add_(part.base)
