"""The metric ``perplexity``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from luthier.api import TokenLoss
from luthier_plugins.metrics.config import PerplexityConfig


class Perplexity:
    """exp(sum of -log p over all target tokens / their number)."""

    needs: Literal["losses"] = "losses"

    def __init__(self, config: PerplexityConfig) -> None:
        self.config = config

    def score(self, items: Sequence[TokenLoss]) -> float:
        return math.exp(sum(item.nll for item in items) / sum(item.tokens for item in items))
