"""The metric ``numeric``."""

from __future__ import annotations

import re

from luthier.api import DataError, Sample
from luthier_plugins.metrics.answers import AnswerMetric
from luthier_plugins.metrics.config import NumericConfig

NUMBER = re.compile(r"(?:(?<![\w.)])-)?(?<![A-Za-z_])(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
"""A number, with commas between thousands or without. The minus of `10-20` is none of its second number's."""


class Numeric(AnswerMetric[NumericConfig]):
    """The share of answers whose number is that of the reference, from 0 to 1."""

    def of(self, sample: Sample) -> float | None:
        right = self._number(sample.reference)
        if right is None:
            raise DataError(
                f"the metric 'numeric' finds no number in the reference {sample.reference[:80]!r}",
                hint="take another metric, or rows whose answers are numbers",
            )
        said = self._number(sample.answer)
        return None if said is None else float(abs(said - right) <= self.config.tolerance * abs(right))

    def _number(self, text: str) -> float | None:
        mark = self.config.mark
        if mark and mark in text:
            # What stands behind the last mark: a model may go on with another question.
            behind = NUMBER.search(text.rpartition(mark)[2])
            return None if behind is None else _value(behind[0])
        found = NUMBER.findall(text)
        return _value(found[-1]) if found else None


def _value(text: str) -> float:
    return float(text.replace(",", ""))
