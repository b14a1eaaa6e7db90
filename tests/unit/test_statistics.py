"""Intervals and tests: against scipy on the same numbers, and by how often they are right on made-up ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from luthier.reporting.statistics import (
    bootstrap,
    corrected,
    difference,
    mcnemar,
    mean_of,
    resampled_difference,
    spread_of,
    wilson,
)
from scipy import stats

NUMBERS = st.lists(st.floats(-9, 9), min_size=3, max_size=40).filter(lambda found: np.ptp(found) > 1e-3)


@given(st.integers(0, 40), st.integers(1, 40), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_is_scipy_s(hits: int, more: int, level: float) -> None:
    made = wilson(hits, hits + more, level)
    right = stats.binomtest(hits, hits + more).proportion_ci(level, method="wilson")
    assert (made.low, made.high) == (pytest.approx(right.low, abs=1e-12), pytest.approx(right.high, abs=1e-12))


@given(NUMBERS, st.data())
def test_means_and_differences_are_scipy_s(values: list[float], data: st.DataObject) -> None:
    made = mean_of(values)
    right = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    assert (made.low, made.high) == (pytest.approx(right[0]), pytest.approx(right[1]))
    others = data.draw(st.lists(st.floats(-9, 9), min_size=len(values), max_size=len(values)))
    if np.ptp(np.asarray(values) - np.asarray(others)) < 1e-3:
        return
    found = difference(values, others)
    test = stats.ttest_rel(values, others)
    if found.test == "t":
        assert found.p == pytest.approx(test.pvalue, abs=1e-9)
    ends = test.confidence_interval()
    assert (found.interval.low, found.interval.high) == (pytest.approx(ends.low), pytest.approx(ends.high))


@given(st.lists(st.tuples(st.floats(-9, 9), st.integers(1, 9)), min_size=3, max_size=20))
def test_weights_count_as_tokens_do(rows: list[tuple[float, int]]) -> None:
    """Each row's tokens are one cluster of equal numbers: what its weight says."""
    values, weights = zip(*rows, strict=True)
    tokens = [value for value, count in rows for _ in range(count)]
    owners = [place for place, (_, count) in enumerate(rows) for _ in range(count)]
    made, right = mean_of(values, weights), mean_of(tokens, clusters=owners)
    assert made.value == pytest.approx(right.value)
    assert (made.low, made.high, made.n) == (pytest.approx(right.low), pytest.approx(right.high), right.n)


def test_mcnemar_is_the_sign_test_of_what_differs() -> None:
    ours = [1.0] * 12 + [0.0] * 3 + [1.0] * 30
    theirs = [0.0] * 12 + [1.0] * 3 + [1.0] * 30
    found = difference(ours, theirs)
    assert found.test == "mcnemar"
    assert found.p == mcnemar(12, 3) == pytest.approx(stats.binomtest(12, 15).pvalue)
    assert mcnemar(0, 0) == 1.0


def test_intervals_hold_the_true_mean_as_often_as_they_say() -> None:
    draw = np.random.default_rng(1)
    held = {"t": 0, "clusters": 0, "naive": 0, "wilson": 0}
    rounds = 400
    for _ in range(rounds):
        values = draw.exponential(1.0, 60)
        held["t"] += (made := mean_of(values.tolist())).low < 1 < made.high
        texts = np.repeat(draw.normal(0, 1, 40), 6)
        answers = (texts + draw.normal(0, 0.5, 240)).tolist()
        held["clusters"] += (
            (made := mean_of(answers, clusters=np.repeat(np.arange(40), 6).tolist())).low < 0 < made.high
        )
        held["naive"] += (made := mean_of(answers)).low < 0 < made.high
        held["wilson"] += (made := wilson(int(draw.binomial(50, 0.9)), 50)).low < 0.9 < made.high
    assert held["t"] / rounds > 0.9
    assert 0.92 < held["clusters"] / rounds < 0.98
    assert 0.92 < held["wilson"] / rounds < 0.985
    # Rows of one text taken for independent: wrong half of the time.
    assert held["naive"] / rounds < 0.7


def test_a_difference_is_told_or_says_how_many_rows_would_tell_it() -> None:
    draw = np.random.default_rng(2)
    base = draw.normal(0, 1, 100)
    small = difference((base + draw.normal(0.1, 1, 100)).tolist(), base.tolist())
    assert not small.told
    assert small.needed is not None
    assert small.needed > 100
    # With that many rows it mostly is told.
    apart, spread = small.interval.value, 1.0
    told = 0
    for _ in range(200):
        more = draw.normal(apart, spread, small.needed)
        told += difference(more.tolist(), [0.0] * small.needed).told
    assert told > 130
    large = difference((base + draw.normal(1, 1, 100)).tolist(), base.tolist())
    assert large.told
    assert large.needed is None
    same = difference([1.0, 0.0], [1.0, 0.0])
    assert (same.told, same.p, same.needed) == (False, 1.0, None)


def test_few_rows_ask_for_more_than_the_normal_distribution_would() -> None:
    found = difference([0.1, 0.9, 0.2], [0.0, 0.1, 0.4])
    assert found.needed is not None
    apart = np.array([0.1, 0.8, -0.2])
    z = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
    assert found.needed >= (z * apart.std(ddof=1) / apart.mean()) ** 2
    n = found.needed
    enough = [((stats.t.ppf(0.975, k - 1) + stats.t.ppf(0.8, k - 1)) * apart.std(ddof=1) / apart.mean()) ** 2 <= k
              for k in (n - 1, n)]  # fmt: skip
    assert enough == [False, True]


def test_no_true_difference_is_told_more_often_than_said() -> None:
    draw = np.random.default_rng(3)
    told = sum(difference(*draw.normal(0, 1, (2, 50)).tolist()).told for _ in range(600))
    assert told / 600 < 0.08


def test_several_comparisons_are_corrected_and_one_row_says_nothing() -> None:
    values = [0.01, 0.04, 0.03, 0.5]
    assert corrected(values) == pytest.approx(stats.false_discovery_control(values).tolist())
    assert corrected([]) == []
    alone = mean_of([0.3])
    assert (alone.low, alone.high) == (-math.inf, math.inf)
    assert difference([0.3], [0.1]).p == 1.0


def test_the_same_difference_everywhere_is_no_certainty_of_two() -> None:
    two = difference([1.0] * 4, [0.0] * 4, clusters=["a", "a", "b", "b"])
    assert (two.told, two.p, two.test) == (False, 0.5, "sign")
    many = difference([1.5] * 9, [1.0] * 9)
    assert (many.told, many.p) == (True, 2 * 0.5**9)


def test_a_bootstrap_of_a_few_says_no_more_than_so_many_tosses() -> None:
    values = np.asarray([3.0, 5.0, 4.0])
    for n, clusters in ((2, None), (3, ["a", "a", "b"])):
        draws = bootstrap(lambda places: float(values[places].mean()), n, clusters)
        found = resampled_difference(draws, float(values[:n].mean()), 2)
        assert found.p == 0.5
    alone = bootstrap(lambda places: float(values[places].mean()), 3, ["a", "a", "a"])
    assert spread_of(alone, 4.0, 1).low == -math.inf


@given(st.integers(0, 100))
def test_a_bootstrap_of_a_mean_is_about_student_s(seed: int) -> None:
    values = np.random.default_rng(seed).normal(1, 2, 200)
    draws = bootstrap(lambda places: float(values[places].mean()), len(values))
    found, right = spread_of(draws, float(values.mean()), len(values)), mean_of(values.tolist())
    assert found.low == pytest.approx(right.low, abs=0.06)
    assert found.high == pytest.approx(right.high, abs=0.06)
    # The same draws each time: a report does not change by being made again.
    assert (draws == bootstrap(lambda places: float(values[places].mean()), len(values))).all()
