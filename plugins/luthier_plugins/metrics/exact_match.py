"""The metric ``exact_match``."""

from __future__ import annotations

from luthier.api import Sample
from luthier_plugins.metrics.answers import AnswerMetric, plain
from luthier_plugins.metrics.config import ExactMatchConfig


class ExactMatch(AnswerMetric[ExactMatchConfig]):
    """The share of answers equal to their reference, from 0 to 1."""

    def of(self, sample: Sample) -> float:
        return float(self._normal(sample.answer) == self._normal(sample.reference))

    def _normal(self, text: str) -> str:
        text = plain(text) if self.config.ignore_punctuation else text
        text = text.strip() if self.config.strip else text
        return text.casefold() if self.config.ignore_case else text
