"""The metric ``exact_match``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from luthier.api import Answers, Metric, Needs, Sample, Score
from luthier_plugins.metrics.config import ExactMatchConfig


class ExactMatch(Metric[ExactMatchConfig]):
    """The share of answers equal to their reference, from 0 to 1."""

    higher_is_better: ClassVar[bool] = True

    @property
    def needs(self) -> Needs:
        return Needs(answers=Answers(max_new_tokens=self.config.max_new_tokens))

    def score(self, samples: Sequence[Sample], baseline: Sequence[Sample] | None) -> Score:
        equal = [float(self._normal(item.answer) == self._normal(item.reference)) for item in samples]
        return Score(sum(equal) / len(equal), equal)

    def _normal(self, text: str) -> str:
        text = text.strip() if self.config.strip else text
        return text.casefold() if self.config.ignore_case else text
