"""How sure a measured number is, and a difference of two: intervals, tests, and how many questions would be needed.

Numbers of the same rows are compared pair by pair: what is hard for one model is mostly hard for the other, and only
the differences tell them apart (Miller, Adding Error Bars to Evals, arXiv 2411.00640).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.95
"""How often an interval holds the true value."""
POWER = 0.8
"""How often a true difference is to be found by as many questions as are said to be needed."""
DRAWS = 1000
"""Samples of a bootstrap."""
FARTHEST = 1e4
"""How many times as large as the difference its spread may be for the rows to be counted: a billion of them."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Where a mean lies.

    Attributes:
        value: The mean.
        low: The lower end.
        high: The upper end.
        n: What it was computed from: rows, or clusters of rows.
    """

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Difference:
    """How two models differ on the same rows.

    Attributes:
        interval: The mean difference.
        p: The probability of such a difference, or a larger one, where there is none.
        needed: About how many rows would tell whether there is one of this size; None where these do, or where the
            models do not differ at all.
        test: How `p` was found: ``t``, ``mcnemar``, ``bootstrap``, or ``sign`` where the difference is the same
            everywhere.
    """

    interval: Interval
    p: float
    needed: int | None
    test: str

    @property
    def told(self) -> bool:
        """Whether the interval leaves out zero: only then one is better than the other."""
        return self.interval.low > 0 or self.interval.high < 0


def wilson(hits: int, n: int, level: float = LEVEL) -> Interval:
    """The share of hits among n, by Wilson's score interval (1927): it keeps its level near 0 and 1, too."""
    z = float(stats.norm.ppf((1 + level) / 2))
    share = hits / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half), n)


def mean_of(
    values: Sequence[float],
    weights: Sequence[float] | None = None,
    clusters: Sequence[Hashable] | None = None,
    level: float = LEVEL,
) -> Interval:
    """A mean, by Student's t.

    Args:
        values: One of each row.
        weights: What each counts, such as its tokens.
        clusters: To what each belongs, such as a text that several questions are about: such rows are not independent,
            and an interval that takes them for it would be too narrow.
        level: How often the interval holds the true mean.
    """
    numbers = np.asarray(values, np.float64)
    counts = np.ones(len(numbers)) if weights is None else np.asarray(weights, np.float64)
    mean = float((numbers * counts).sum() / counts.sum())
    # The linearized influence of each cluster on the (weighted) mean: its sum of weighted residuals.
    residuals = (numbers - mean) * counts / counts.sum()
    if clusters is not None:
        residuals = _sums(residuals, clusters)
    n = len(residuals)
    if n < 2:
        return Interval(mean, -math.inf, math.inf, n)
    error = math.sqrt(float((residuals**2).sum()) * n / (n - 1))
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * error
    return Interval(mean, mean - half, mean + half, n)


def difference(
    ours: Sequence[float],
    theirs: Sequence[float],
    weights: Sequence[float] | None = None,
    clusters: Sequence[Hashable] | None = None,
    level: float = LEVEL,
) -> Difference:
    """How far the first model's numbers lie above the second's, row by row.

    Of right and wrong answers that are independent, `p` is McNemar's exact one; of everything else, that of the t test.

    Args:
        ours: One of each row.
        theirs: Of the same rows, in the same order.
        weights: What each row counts.
        clusters: To what each row belongs, see `mean_of`.
        level: How often the interval holds the true difference.
    """
    apart = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    interval = mean_of(apart.tolist(), weights, clusters, level)
    if not apart.any():
        return Difference(Interval(0.0, 0.0, 0.0, interval.n), 1.0, None, "t")
    if interval.low == interval.high:
        # Alike everywhere: only their number says something, as heads of so many tosses do.
        p = min(1.0, 2 * 0.5**interval.n)
        ends = (
            interval
            if p <= 1 - level
            else Interval(interval.value, min(0.0, interval.value), max(0.0, interval.value), interval.n)
        )
        return Difference(ends, p, None, "sign")
    binary = set(np.unique(ours)) | set(np.unique(theirs)) <= {0.0, 1.0}
    if binary and weights is None and clusters is None:
        p, test = mcnemar(int((apart > 0).sum()), int((apart < 0).sum())), "mcnemar"
    else:
        p, test = _p_of(interval, level), "t"
    made = Difference(interval, p, None, test)
    return made if made.told else Difference(interval, p, _needed(interval, level), test)


def bootstrap(value: Callable[[np.ndarray], float], n: int, clusters: Sequence[Hashable] | None = None) -> np.ndarray:
    """What a number would be of other rows: values of `DRAWS` samples, drawn with replacement from these rows (Efron,
    1979), or from clusters of them. The same each time.

    Args:
        value: Makes the number of rows, by their places.
        n: How many rows there are.
        clusters: To what each row belongs, see `mean_of`.
    """
    generator = np.random.default_rng(0)
    groups: dict[Hashable, list[int]] = {}
    for place in range(n):
        groups.setdefault(place if clusters is None else clusters[place], []).append(place)
    members = [np.asarray(places) for places in groups.values()]
    drawn = generator.integers(len(members), size=(DRAWS, len(members)))
    return np.asarray([value(np.concatenate([members[place] for place in line])) for line in drawn])


def spread_of(draws: np.ndarray, value: float, n: int, level: float = LEVEL) -> Interval:
    """The interval of a number by the percentiles of its bootstrap.

    Args:
        draws: What `bootstrap` gave.
        value: The number itself.
        n: How many rows there are, or clusters of them.
        level: How often the interval holds the true value.
    """
    if n < 2:
        return Interval(value, -math.inf, math.inf, n)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    # Percentiles of a biased number may leave out what they are about.
    return Interval(value, min(float(low), value), max(float(high), value), n)


def resampled_difference(draws: np.ndarray, value: float, n: int, level: float = LEVEL) -> Difference:
    """How two models differ by a number that is no mean of rows, from the bootstrap of its difference. `p` is twice
    the smaller share of draws on either side of zero.

    Args:
        draws: What `bootstrap` gave.
        value: The difference.
        n: How many rows there are, or clusters of them.
        level: How often the interval holds the true difference.
    """
    interval = spread_of(draws, value, n, level)
    if not draws.any() and not value:
        return Difference(Interval(0.0, 0.0, 0.0, n), 1.0, None, "bootstrap")
    sides = [int((draws <= 0).sum()), int((draws >= 0).sum())]
    p = min(1.0, 2 * (min(sides) + 1) / (len(draws) + 1))
    # Draws of a few rows cannot say more than that so many tosses fell on one side.
    p = max(p, min(1.0, 2 * 0.5**n))
    made = Difference(interval, p, None, "bootstrap")
    return made if made.told or n < 2 else Difference(interval, p, _needed(interval, level), "bootstrap")


def mcnemar(better: int, worse: int) -> float:
    """McNemar's exact test (1947) of paired right and wrong answers: whether those that only one has right are as often
    the one's as the other's.

    Args:
        better: Rows that only the first has right.
        worse: Rows that only the second has right.
    """
    return 1.0 if better + worse == 0 else float(stats.binomtest(better, better + worse).pvalue)


def corrected(values: Sequence[float]) -> list[float]:
    """Probabilities of several comparisons, by Benjamini and Hochberg (1995): of those below a bound, no more than this
    share is false on average."""
    return [float(p) for p in stats.false_discovery_control(values)] if values else []


def _p_of(interval: Interval, level: float) -> float:
    """The t test's probability, from the interval that it belongs to."""
    half = (interval.high - interval.low) / 2
    if not math.isfinite(half):
        return 1.0
    if half == 0:
        return 0.0
    error = half / float(stats.t.ppf((1 + level) / 2, interval.n - 1))
    return float(2 * stats.t.sf(abs(interval.value) / error, interval.n - 1))


def _needed(interval: Interval, level: float) -> int | None:
    """How many rows (or clusters) tell a difference of this size from none: the least n with n >= ((t + t') s / d)
    squared, the quantiles those of Student's t with n - 1 degrees."""
    half = (interval.high - interval.low) / 2
    if not interval.value or not math.isfinite(half):
        return None
    ratio = half / float(stats.t.ppf((1 + level) / 2, interval.n - 1)) * math.sqrt(interval.n) / abs(interval.value)

    if ratio > FARTHEST:
        return None

    def wanted(n: int) -> float:
        quantiles = float(stats.t.ppf((1 + level) / 2, n - 1) + stats.t.ppf(POWER, n - 1))
        return (quantiles * ratio) ** 2

    # The more there are, the smaller the quantiles: a step may go too far, and is taken back.
    n = max(2, interval.n + 1)
    while wanted(n) > n:
        n = max(n + 1, min(math.ceil(wanted(n)), 2 * n))
    while n > interval.n + 1 and wanted(n - 1) <= n - 1:
        n -= 1
    return n


def _sums(values: np.ndarray, clusters: Sequence[Hashable]) -> np.ndarray:
    """The sum of each cluster's values."""
    numbers: dict[Hashable, int] = {}
    places: Any = [numbers.setdefault(cluster, len(numbers)) for cluster in clusters]
    return np.bincount(places, values, len(numbers))
