"""People compare two models' answers without knowing whose they are: the pairs, and what their verdicts say."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, cast, get_args

from luthier.api.artifact import Artifact
from luthier.api.errors import DataError
from luthier.reporting.examples import report_rows
from luthier.reporting.statistics import Interval, mcnemar, mean_of

Verdict = Literal["left", "right", "tie", "bad", "skip"]
VERDICTS: tuple[str, ...] = get_args(Verdict)
"""The left answer is better, the right one is, both are as good, both are bad, and no verdict."""
KIND = "luthier verdicts"


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt.

    Attributes:
        row: The row's number in the split, from 1.
        prompt: What was asked.
        left: The answer on the left.
        right: The one on the right.
        swapped: Whether the left one is the other model's. No page says it.
    """

    row: int
    prompt: str
    left: str
    right: str
    swapped: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is compared.

    Attributes:
        pairs: The pairs, in the order in which they are shown.
        digest: What a file of verdicts names, so that it is not read as one on other pairs.
        ours: What the measured model is called.
        theirs: What the other one is called.
    """

    pairs: Sequence[Pair]
    digest: str
    ours: str
    theirs: str


def comparison_of(report: Artifact, other: int, seed: int, most: int | None) -> Comparison:
    """The pairs of a report on which both models answered, and not the same.

    Args:
        report: What the stage `evaluate` made.
        other: Which of `against`, from 1.
        seed: Draws the order and the sides.
        most: How many pairs; None: all.

    Raises:
        DataError: there is nothing to compare.
    """
    others: Sequence[Mapping[str, Any]] = report.facts.get("against") or []
    name = report.manifest["stage"]
    if report.kind != "report" or not others:
        hint = "name a report of the stage `evaluate` that has `against`"
        raise DataError(f"{name} is no report that compares models", hint=hint)
    if not 1 <= other <= len(others):
        raise DataError(f"{name} has no comparison {other}: it has {len(others)}", hint="choose with --against")
    mine, theirs = (_answers(report.path / name) for name in ("model.jsonl", f"against-{other}.jsonl"))
    draw = random.Random(seed)
    pairs: list[Pair] = []
    for row, (prompt, answer) in mine.items():
        said = theirs.get(row, ("", None))[1]
        if answer is None or said is None or answer.strip() == said.strip():
            continue
        swapped = draw.random() < 0.5
        left, right = (said, answer) if swapped else (answer, said)
        pairs.append(Pair(row, prompt, left, right, swapped))
    if not pairs:
        raise DataError("there are no two answers that differ", hint="measure a metric of answers, such as exact_match")
    draw.shuffle(pairs)
    pairs = pairs[:most]
    about = [report.key, other, [[pair.row, pair.left, pair.right] for pair in pairs]]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    names = [str(report.facts["stage"]), str(others[other - 1].get("stage", "other"))]
    if names[0] == names[1]:
        names[1] = f"{names[1]} ({others[other - 1].get('key', '')[:12]})"
    return Comparison(pairs, digest, *names)


def _answers(path: Path) -> dict[int, tuple[str, str | None]]:
    """Prompt and first answer of each row."""
    found: dict[int, tuple[str, str | None]] = {}
    for number, item in enumerate(report_rows(path), 1):
        answers: Mapping[str, Sequence[str]] = item.get("answers") or {}
        given = next((texts for texts in answers.values() if texts), None)
        found[int(item.get("row") or number)] = (str(item.get("prompt") or ""), given[0] if given else None)
    return found


def written(comparison: Comparison, judge: str, verdicts: Mapping[int, str]) -> str:
    """A file of verdicts."""
    about = {"kind": KIND, "of": comparison.digest, "judge": judge}
    return json.dumps({**about, "verdicts": {str(row): verdict for row, verdict in verdicts.items()}}, indent=1)


def read_verdicts(text: str, comparison: Comparison, where: str) -> tuple[str, dict[int, str]]:
    """Who judged, and their verdicts by row.

    Args:
        text: The file.
        comparison: What is compared.
        where: What the file is called.

    Raises:
        DataError: it is no such file, or is about other pairs.
    """
    try:
        found: Any = json.loads(text)
    except ValueError as error:
        raise DataError(f"this is no file of verdicts: {error}", where=where) from error
    if not isinstance(found, dict) or cast("Any", found).get("kind") != KIND:
        raise DataError("this is no file of verdicts", where=where, hint="take what the page saved")
    about = cast("dict[str, Any]", found)
    if about.get("of") != comparison.digest:
        raise DataError(
            "these verdicts are about other pairs",
            where=where,
            hint="name the same report, with the same --against, --seed and --rows as when the page was made",
        )
    rows = {pair.row for pair in comparison.pairs}
    given: Any = about.get("verdicts")
    verdicts: dict[str, Any] = cast("dict[str, Any]", given) if isinstance(given, dict) else {}
    bad = [item for item in verdicts.items() if item[1] not in VERDICTS or not item[0].isdecimal()]
    if bad or not {int(row) for row in verdicts} <= rows:
        raise DataError("this file has verdicts that no page gives", where=where)
    return str(about.get("judge") or where), {int(row): str(verdict) for row, verdict in verdicts.items()}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What verdicts say.

    Attributes:
        rate: The share of pairs that the measured model won, ties a half, with its interval; several judges of a pair
            count together as one.
        won: Pairs that it won by most verdicts.
        lost: Pairs that it lost.
        neither: Pairs without a winner.
        bad: How many verdicts say that both are bad.
        skipped: How many pairs nobody judged.
        p: Of the sign test of those that were won and lost.
        agreement: For each two judges, their names, how many pairs both judged, the share of equal verdicts, and
            Cohen's kappa (1960); None where it is not defined.
    """

    rate: Interval
    won: int
    lost: int
    neither: int
    bad: int
    skipped: int
    p: float
    agreement: Sequence[tuple[str, str, int, float, float | None]]


def outcome(comparison: Comparison, judged: Sequence[tuple[str, Mapping[int, str]]]) -> Outcome:
    """What came of it.

    Args:
        comparison: What was compared.
        judged: Who judged, and their verdicts by row.

    Raises:
        DataError: nobody judged anything.
    """
    points: dict[int, list[float]] = {}
    bad = 0
    plain: list[dict[int, float]] = []
    for _, verdicts in judged:
        own: dict[int, float] = {}
        for pair in comparison.pairs:
            verdict = verdicts.get(pair.row, "skip")
            bad += verdict == "bad"
            if verdict != "skip":
                own[pair.row] = _points(verdict, swapped=pair.swapped)
                points.setdefault(pair.row, []).append(own[pair.row])
        plain.append(own)
    if not points:
        raise DataError("no pair was judged")
    means = [sum(given) / len(given) for given in points.values()]
    won, lost = sum(mean > 0.5 for mean in means), sum(mean < 0.5 for mean in means)
    names = [name for name, _ in judged]
    agreement = [
        (names[one], names[two], *_agreement(plain[one], plain[two])) for one, two in combinations(range(len(names)), 2)
    ]
    return Outcome(
        mean_of(means),
        won,
        lost,
        len(means) - won - lost,
        bad,
        len(comparison.pairs) - len(means),
        mcnemar(won, lost),
        agreement,
    )


def _points(verdict: str, *, swapped: bool) -> float:
    """What the measured model gets of a verdict."""
    if verdict not in ("left", "right"):
        return 0.5
    return float((verdict == "left") != swapped)


def _agreement(one: Mapping[int, float], other: Mapping[int, float]) -> tuple[int, float, float | None]:
    both = [(one[row], other[row]) for row in one if row in other]
    if not both:
        return 0, 0.0, None
    equal = sum(mine == theirs for mine, theirs in both) / len(both)
    # What two would agree on that say the same shares of each by chance.
    chance = (
        sum(
            sum(mine == kind for mine, _ in both) * sum(theirs == kind for _, theirs in both)
            for kind in (0.0, 0.5, 1.0)
        )
        / len(both) ** 2
    )
    return len(both), equal, None if chance == 1 else (equal - chance) / (1 - chance)


def told(comparison: Comparison, found: Outcome) -> list[str]:
    """An outcome as lines."""
    rate = found.rate
    low, high = max(0.0, rate.low), min(1.0, rate.high)
    lines = [
        f"{comparison.ours} against {comparison.theirs}: won {found.won:,}, lost {found.lost:,}, neither "
        f"{found.neither:,}, of {rate.n:,} pairs",
        f"it wins {rate.value:.1%} (95 %: {low:.1%} to {high:.1%}), p {found.p:.2g}",
    ]
    if found.p > 0.05 or rate.low <= 0.5 <= rate.high:
        lines.append("neither of them is shown to be better")
    if found.bad:
        lines.append(f"{found.bad:,} verdicts say that both answers are bad")
    if found.skipped:
        lines.append(f"{found.skipped:,} pairs were not judged")
    for one, two, count, share, kappa in found.agreement:
        known = "" if kappa is None else f", kappa {kappa:.2f}"
        lines.append(f"{one} and {two} agree on {share:.0%} of {count:,} pairs that both judged{known}")
    return lines
