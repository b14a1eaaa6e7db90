"""The metric ``perplexity``."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import ClassVar

from luthier.api import Metric, Needs, Sample, Score
from luthier.artifacts.rows import conversations
from luthier_plugins.metrics.config import PerplexityConfig


class Perplexity(Metric[PerplexityConfig]):
    """exp(sum of -log p over all target tokens / their number), or / the number of bytes that they spell."""

    higher_is_better: ClassVar[bool] = False

    @property
    def needs(self) -> Needs:
        return Needs(token_logps=True)

    def score(self, samples: Sequence[Sample], baseline: Sequence[Sample] | None) -> Score:
        units = [len(item.logps) if self.config.per == "token" else _bytes(item) for item in samples]
        losses = [-sum(item.logps) for item in samples]
        means = [loss / max(1, count) for loss, count in zip(losses, units, strict=True)]
        return Score(_exp(sum(losses) / max(1, sum(units))), means, units, _exp)


def _bytes(sample: Sample) -> int:
    """The bytes of what is trained of a row: the assistant's turns, with what they think and call."""
    said: list[str] = []
    for message in conversations(sample.row)[0]:
        if message["role"] == "assistant" and message.get("train", True):
            said += [message["content"], message.get("reasoning") or ""]
            said += [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in said)


def _exp(mean: float) -> float:
    try:
        return math.exp(mean)
    # Beyond what a number can be: a made-up large one would pass for a score.
    except OverflowError:
        return math.inf
