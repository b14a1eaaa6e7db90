"""How sure scores are, and the differences of two models'."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from luthier.api import Facts, Score
from luthier.reporting.statistics import (
    LEVEL,
    Difference,
    Interval,
    bootstrap,
    corrected,
    difference,
    mean_of,
    resampled_difference,
    spread_of,
    wilson,
)

SAME = 1e-9
"""By how much the mean of rows may differ from a metric's value which it is."""


def intervals(scores: Mapping[str, Score], clusters: Mapping[str, Sequence[Hashable]]) -> dict[str, list[float]]:
    """Between which values each metric's true one lies, in 95 of 100 cases; of metrics that are no mean of rows, such
    as BLEU, by bootstrap where they can be computed of drawn rows, else none.

    Args:
        scores: The metrics.
        clusters: To what each row belongs, by metric, where rows are not independent.
    """
    found = {name: _interval(score, clusters.get(name)) for name, score in scores.items()}
    return {
        name: [ends.low, ends.high]
        for name, ends in found.items()
        if ends is not None and math.isfinite(ends.low) and math.isfinite(ends.high)
    }


def _interval(score: Score, clusters: Sequence[Hashable] | None) -> Interval | None:
    if score.resampled is not None:
        count = len(score.by_row) if clusters is None else len(set(clusters))
        return spread_of(bootstrap(score.resampled, len(score.by_row), clusters), score.value, count)
    values, weights, groups = _given(score, clusters)
    if not values or not score.is_mean:
        return None
    binary = set(values) <= {0.0, 1.0} and weights is None
    if binary and groups is None:
        made = wilson(int(sum(values)), len(values))
    elif binary and len(set(values)) == 1:
        # All right, or all wrong: so many clusters say that, and not that it is certain.
        made = wilson(int(values[0]) * len(set(groups or ())), len(set(groups or ())))
    else:
        made = mean_of(values, weights, groups)
    if score.of_mean is not None:
        value, low, high = (_applied(score.of_mean, end) for end in (made.value, made.low, made.high))
        made = Interval(value, low, high, made.n)
    right = abs(made.value - score.value) <= SAME * max(1.0, abs(score.value))
    return made if right else None


def _applied(function: Any, value: float) -> float:
    try:
        return float(function(value))
    except OverflowError:
        return math.inf


def _given(
    score: Score, clusters: Sequence[Hashable] | None
) -> tuple[list[float], list[float] | None, list[Hashable] | None]:
    """The rows that a metric says something of."""
    places = [place for place, value in enumerate(score.by_row) if value is not None]
    values = [float(value) for value in score.by_row if value is not None]
    weights = None if score.weights is None else [score.weights[place] for place in places]
    return values, weights, None if clusters is None else [clusters[place] for place in places]


def differences(
    ours: Mapping[str, Score],
    theirs: Mapping[str, Score],
    better: Mapping[str, bool],
    clusters: Mapping[str, Sequence[Hashable]],
) -> Facts:
    """How far one model is from another, by metric, on the scale of rows (of a perplexity, nats per token).

    Args:
        ours: The metrics of the model.
        theirs: Those of the other one; of some of them none, which are not compared.
        better: Whether higher is better.
        clusters: See `intervals`.

    Returns:
        For each metric ``value``, ``low`` and ``high`` of the mean difference, ``p`` (``corrected`` for all metrics
        that are compared), ``test``, ``verdict`` (better, worse, or not told), and ``needed``, how many rows would tell
        a difference of this size.
    """
    made: dict[str, Any] = {}
    for name in (name for name in ours if name in theirs):
        pairs = [
            (float(mine), float(other), place)
            for place, (mine, other) in enumerate(zip(ours[name].by_row, theirs[name].by_row, strict=True))
            if mine is not None and other is not None
        ]
        if len(pairs) < 2:
            continue
        found = _difference(ours[name], theirs[name], pairs, clusters.get(name))
        made[name] = {
            "value": found.interval.value,
            "low": found.interval.low,
            "high": found.interval.high,
            "p": found.p,
            "test": found.test,
            "rows": len(pairs),
            # In rows, also where clusters of them are what counts.
            "needed": found.needed and math.ceil(found.needed * len(pairs) / found.interval.n),
            "corrected": found.p,
        }
    # Metrics in which not one row differs are no comparison.
    compared = [about for about in made.values() if about["low"] < about["high"]]
    for about, p in zip(compared, corrected([about["p"] for about in compared]), strict=True):
        about["corrected"] = p
    for name, about in made.items():
        told = about["low"] > 0 or about["high"] < 0
        # What one comparison of several shows by chance is not told either.
        if not told or about["corrected"] > 1 - LEVEL:
            about["verdict"] = "not told"
        else:
            about["verdict"] = "better" if (about["value"] > 0) == better[name] else "worse"
    return {name: about for name, about in made.items() if math.isfinite(about["low"]) and math.isfinite(about["high"])}


def _difference(
    ours: Score, theirs: Score, pairs: Sequence[tuple[float, float, int]], clusters: Sequence[Hashable] | None
) -> Difference:
    """How far two scores are apart.

    Args:
        ours: The model's.
        theirs: The other one's.
        pairs: What both give to a row, and its place.
        clusters: To what each row belongs.
    """
    if ours.resampled is not None and theirs.resampled is not None:
        mine, other = ours.resampled, theirs.resampled
        # The same rows are drawn for both: what is hard for one is mostly hard for the other.
        draws = bootstrap(lambda places: mine(places) - other(places), len(ours.by_row), clusters)
        count = len(ours.by_row) if clusters is None else len(set(clusters))
        return resampled_difference(draws, ours.value - theirs.value, count)
    known = ours.weights
    return difference(
        [mine for mine, _, _ in pairs],
        [other for _, other, _ in pairs],
        # Two tokenizers cut a row into unlike numbers of tokens: then rows are what counts.
        None if known is None or known != theirs.weights else [known[place] for *_, place in pairs],
        None if clusters is None else [clusters[place] for *_, place in pairs],
    )
