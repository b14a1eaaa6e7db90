"""The metric ``perplexity``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from luthier.api import TokenLoss
from luthier_plugins.metrics.config import PerplexityConfig

LARGEST = 700.0
"""The mean beyond which exp would overflow."""


class Perplexity:
    """exp(sum of -log p over all target tokens / their number)."""

    needs: Literal["losses"] = "losses"

    def __init__(self, config: PerplexityConfig) -> None:
        self.config = config

    def score(self, items: Sequence[TokenLoss]) -> float:
        mean = sum(item.nll for item in items) / sum(item.tokens for item in items)
        return math.exp(min(mean, LARGEST)) if not math.isnan(mean) else math.nan
