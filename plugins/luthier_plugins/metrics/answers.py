"""What the metrics share that look at answers one by one."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import ClassVar, TypeVar

from luthier.api import Answers, Metric, Needs, Sample, Score
from luthier_plugins.metrics.config import AnswerMetricConfig

C = TypeVar("C", bound=AnswerMetricConfig)
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class AnswerMetric(Metric[C]):
    """The mean of a number for each answer."""

    higher_is_better: ClassVar[bool] = True

    @property
    def needs(self) -> Needs:
        return Needs(answers=Answers(max_new_tokens=self.config.max_new_tokens))

    def of(self, sample: Sample) -> float | None:
        """The number of an answer; None: it cannot be read, which counts as 0."""
        raise NotImplementedError

    def score(self, samples: Sequence[Sample], baseline: Sequence[Sample] | None) -> Score:
        found = [self.of(item) for item in samples]
        numbers = [value or 0.0 for value in found]
        return Score(sum(numbers) / len(numbers), numbers, unread=found.count(None))


def plain(text: str) -> str:
    """A text without punctuation, and with single spaces."""
    return " ".join(text.translate(_PUNCTUATION).split())
