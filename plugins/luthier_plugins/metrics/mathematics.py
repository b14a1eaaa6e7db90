"""The metric ``math``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

from luthier.api import DataError, Sample, Score
from luthier.artifacts.extras import needed
from luthier_plugins.metrics.answers import AnswerMetric
from luthier_plugins.metrics.config import MathConfig
from luthier_plugins.metrics.mathematics_helper import UNREADABLE
from luthier_plugins.metrics.processes import Helper


class Math(AnswerMetric[MathConfig]):
    """The share of answers that are mathematically equal to the reference, from 0 to 1: fractions, roots, sets,
    intervals and matrices in LaTeX or plain text, by math-verify."""

    def score(self, samples: Sequence[Sample], baseline: Sequence[Sample] | None) -> Score:
        needed("math_verify", "math-verify[antlr4_13_2]", "evaluation")
        rows: list[float] = []
        unread = stopped = 0
        with closing(Helper("luthier_plugins.metrics.mathematics_helper")) as helper:
            for sample in samples:
                try:
                    found = helper.ask({"reference": sample.reference, "answer": sample.answer}, self.config.seconds)
                except (TimeoutError, OSError):
                    stopped += 1
                    found = False
                if found == UNREADABLE:
                    raise DataError(
                        f"the metric 'math' cannot read the reference {sample.reference[:80]!r}",
                        hint="take another metric, or rows whose answers are mathematics",
                    )
                unread += found is None
                rows.append(float(found or 0.0))
        counts = {"comparisons were given up": stopped} if stopped else {}
        return Score(sum(rows) / len(rows), rows, unread=unread, counts=counts)
