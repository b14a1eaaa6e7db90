"""The metric ``perplexity``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from luthier.api import Metric, Needs, Sample, Score
from luthier_plugins.metrics.config import PerplexityConfig


class Perplexity(Metric[PerplexityConfig]):
    """exp(sum of -log p over all target tokens / their number)."""

    higher_is_better: ClassVar[bool] = False

    @property
    def needs(self) -> Needs:
        return Needs(token_logps=True)

    def score(self, samples: Sequence[Sample], baseline: Sequence[Sample] | None) -> Score:
        tokens = [len(item.logps) for item in samples]
        losses = [-sum(item.logps) for item in samples]
        means = [loss / max(1, count) for loss, count in zip(losses, tokens, strict=True)]
        return Score(_exp(sum(losses) / sum(tokens)), means, tokens)


def _exp(mean: float) -> float:
    try:
        return math.exp(mean)
    # Beyond what a number can be: a made-up large one would pass for a score.
    except OverflowError:
        return math.inf
