"""The rows of a report on which two models differ most."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

FEW = 5
"""Rows for each direction."""
LONGEST = 1500
"""Letters of a text that are shown."""


@dataclass(frozen=True, slots=True)
class Example:
    """A row that two models did differently.

    Attributes:
        row: Its number, from 1.
        prompt: What was asked.
        reference: The row's own answer.
        ours: What the model answered; empty where it was not asked for answers.
        theirs: What the other one did.
        gain: By how much the model's score is above the other's.
    """

    row: int
    prompt: str
    reference: str
    ours: str
    theirs: str
    gain: float


def most_unlike(folder: Path, metric: str) -> tuple[list[Example], list[Example]]:
    """Those that the model won by most, and those that it lost by most, one by one from the files of a report.

    Args:
        folder: The report.
        metric: By which metric. The sign is its own: of a perplexity, what is gained is worse.
    """
    won: list[tuple[float, int, Example]] = []
    lost: list[tuple[float, int, Example]] = []
    pairs = zip_longest(report_rows(folder / "model.jsonl"), report_rows(folder / "against-1.jsonl"), fillvalue={})
    for number, (mine, other) in enumerate(pairs, 1):
        ours, theirs = (_score(found, metric) for found in (mine, other))
        if ours is None or theirs is None or ours == theirs:
            continue
        found = Example(
            int(mine.get("row") or number),
            _text(mine.get("prompt")),
            _text(mine.get("reference")),
            _answer(mine, metric),
            _answer(other, metric),
            ours - theirs,
        )
        # Of equal ones the first rows stay; the number keeps examples from being compared.
        kept = won if found.gain > 0 else lost
        heapq.heappush(kept, (abs(found.gain), -number, found))
        if len(kept) > FEW:
            heapq.heappop(kept)
    return [item for *_, item in sorted(won, reverse=True)], [item for *_, item in sorted(lost, reverse=True)]


def report_rows(path: Path) -> Iterator[dict[str, Any]]:
    """What a report says of each row for one of its models; nothing where it has no such file."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _score(found: dict[str, Any], metric: str) -> float | None:
    value: Any = (found.get("scores") or {}).get(metric)
    return float(value) if isinstance(value, int | float) else None


def _answer(found: dict[str, Any], metric: str) -> str:
    answers: dict[str, Any] = found.get("answers") or {}
    # A metric of probabilities asks for none: then what any other was answered.
    given = answers.get(metric) or next(iter(answers.values()), [])
    return _text(cast("list[Any]", given)[0]) if given else ""


def _text(value: Any) -> str:
    text = str(value or "")
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text):,} letters)"
