"""The metric ``pass_at_k``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from math import comb
from typing import Any, ClassVar

from luthier.api import Answers, LuthierError, Metric, Needs, Sample, Score
from luthier_plugins.metrics.config import PassAtKConfig


class PassAtK(Metric[PassAtKConfig]):
    """The probability that one of k drawn answers is right, estimated without bias from n of them (Chen et al.,
    arXiv 2107.03374): the mean over rows of 1 - C(n - c, k) / C(n, k), c of them right."""

    higher_is_better: ClassVar[bool] = True

    @cached_property
    def _inner(self) -> Metric[Any]:
        made: Metric[Any] = self.context.build(self.config.of)
        if made.needs.answers is None or made.needs.probabilities or made.needs.baseline:
            raise LuthierError(
                f"the metric '{self.config.of.name}' does not look at answers alone",
                hint="`of` takes one that does, such as numeric, exact_match, math or code_runs",
            )
        return made

    @property
    def needs(self) -> Needs:
        asked = self._inner.needs.answers
        limit = self.config.max_new_tokens or (asked.max_new_tokens if asked is not None else None)
        return Needs(answers=Answers(self.config.n, self.config.temperature, self.config.top_p, limit))

    def score(self, samples: Sequence[Sample], baseline: Sequence[Sample] | None) -> Score:
        n, k = self.config.n, self.config.k
        # One call: what looks at answers may have something to start.
        each = [replace(sample, answers=(answer,)) for sample in samples for answer in sample.answers]
        found = self._inner.score(each, None)
        odd = {value for value in found.by_row if value not in (0.0, 1.0)}
        if odd:
            raise LuthierError(
                f"the metric '{self.config.of.name}' gives {odd.pop()} to an answer, which is neither right nor wrong",
                hint="`of` takes a metric that gives 1 or 0",
            )
        rows: list[float | None] = []
        for place in range(len(samples)):
            right = sum(value == 1.0 for value in found.by_row[place * n : (place + 1) * n])
            rows.append(1 - comb(n - right, k) / comb(n, k))
        return Score(sum(row or 0.0 for row in rows) / len(rows), rows, unread=found.unread, counts=found.counts)
