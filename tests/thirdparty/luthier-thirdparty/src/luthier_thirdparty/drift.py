"""A metric that compares two models on the same rows."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from luthier.api import Metric, Needs, Sample, Score

from luthier_thirdparty.config import DriftConfig


class Drift(Metric[DriftConfig]):
    """The mean KL divergence of the baseline's next-token distribution from the model's, in nats a token."""

    higher_is_better: ClassVar[bool] = False

    @property
    def needs(self) -> Needs:
        return Needs(distributions=True, baseline=True)

    def score(self, samples: Sequence[Sample], baseline: Sequence[Sample] | None) -> Score:
        assert baseline is not None
        by_row, weights = [], []
        for mine, theirs in zip(samples, baseline, strict=True):
            assert mine.distribution is not None
            assert theirs.distribution is not None
            p, q = theirs.distribution(), mine.distribution()
            by_row.append(float((np.exp(p) * (p - q)).sum(axis=1).mean()))
            weights.append(float(len(p)))
        return Score(float(np.average(by_row, weights=weights)), by_row, weights)
