"""Pictures of a run as SVG, without scripts: its stages, the curves of training, and intervals side by side."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from luthier.reporting.runs import RunRecord, StageRecord

SIGNS = {
    "done": "✓",
    "cached": "=",
    "failed": "✗",
    "skipped": "/",
    "interrupted": "‖",
    "running": "…",
    "waiting": "·",
}
"""How an outcome is told without its colour."""
BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y = 150, 46, 44, 14
CURVE_WIDTH, CURVE_HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 180, 56, 10, 8, 24
MOST_POINTS = 300
"""Points of a curve: more would not be seen."""
FOREST_WIDTH, FOREST_LINE, FOREST_LABEL, FOREST_VALUE = 700, 26, 150, 190
READABLE = 0.8
"""Down to which share of its size the stages are made smaller, before they are scrolled."""
LONG_NAME = 19
"""Letters of a stage's name that a box has room for."""
STYLE = """
.picture { max-width: 100%; height: auto; } .scroll { overflow-x: auto; }
.picture text { fill: var(--ink); font: 12px system-ui, sans-serif; }
.picture .soft { fill: var(--soft); font-size: 11px; }
.picture .box { fill: var(--paper); stroke: var(--line); stroke-width: 1.5; }
.picture .box.failed, .picture .box.interrupted { stroke: var(--bad); stroke-width: 2.5; }
.picture .box.skipped, .picture .box.waiting { stroke-dasharray: 4 3; }
.picture .box.critical { stroke: var(--strong); stroke-width: 3; }
.picture .edge { fill: none; stroke: var(--line); stroke-width: 1.5; }
.picture .edge.critical { stroke: var(--strong); stroke-width: 3; }
.picture .curve { fill: none; stroke: var(--strong); stroke-width: 1.8; } .picture .axis { stroke: var(--line); }
.picture .hover { fill: transparent; } .picture .hover:hover { fill: var(--strong); }
.picture .zero { stroke: var(--soft); stroke-dasharray: 3 3; }
.picture .span { stroke: var(--strong); stroke-width: 2.5; }
.picture .mean { fill: var(--strong); }
"""
"""What a page has to say of its pictures; it defines the colours ``--ink``, ``--paper``, ``--strong``, ``--bad``."""


def pipeline(run: RunRecord) -> str:
    """The stages of a run, each behind those that it waits for; the critical path is thick."""
    columns = _columns(run.stages)
    places: dict[str, tuple[float, float]] = {}
    rows: dict[int, int] = {}
    for name, column in columns.items():
        row = rows.get(column, 0)
        rows[column] = row + 1
        places[name] = (8 + column * (BOX_WIDTH + GAP_X), 8 + row * (BOX_HEIGHT + GAP_Y))
    width = 16 + (max(columns.values(), default=0) + 1) * (BOX_WIDTH + GAP_X) - GAP_X
    height = 16 + max(rows.values(), default=1) * (BOX_HEIGHT + GAP_Y) - GAP_Y
    path = run.critical_path
    steps = set(pairwise(path))
    parts = [
        _edge(places[before], places[name], critical=(before, name) in steps)
        for name, stage in run.stages.items()
        for before in stage.waits_for
        if before in places
    ]
    parts += [_box(stage, places[name], critical=name in path) for name, stage in run.stages.items()]
    told = f"{len(run.stages)} stages; the critical path is {', then '.join(path)}" if path else "the stages"
    return (
        f'<div class=scroll><svg class=picture style="min-width:{READABLE * width:.0f}px" width="{width}" '
        f'viewBox="0 0 {width} {height}" role=img aria-label="{html.escape(told)}">{"".join(parts)}</svg></div>'
    )


def _columns(stages: Mapping[str, StageRecord]) -> dict[str, int]:
    """How far to the right each stage stands: one more than what it waits for."""
    found: dict[str, int] = {}
    for name, stage in stages.items():
        found[name] = max((found[before] + 1 for before in stage.waits_for if before in found), default=0)
    return found


def _edge(start: tuple[float, float], end: tuple[float, float], *, critical: bool) -> str:
    x, y = start[0] + BOX_WIDTH, start[1] + BOX_HEIGHT / 2
    to_x, to_y = end[0], end[1] + BOX_HEIGHT / 2
    half = (to_x - x) / 2
    more = " critical" if critical else ""
    return (
        f'<path class="edge{more}" d="M{x:.0f} {y:.0f} C{x + half:.0f} {y:.0f} {to_x - half:.0f} {to_y:.0f} '
        f'{to_x:.0f} {to_y:.0f}"/>'
    )


def _box(stage: StageRecord, place: tuple[float, float], *, critical: bool) -> str:
    x, y = place
    name = stage.id if len(stage.id) <= LONG_NAME else f"{stage.id[: LONG_NAME - 1]}…"
    time = duration(stage.seconds) if stage.seconds is not None and stage.outcome in ("done", "failed") else ""
    about = ", ".join(part for part in (stage.uses, stage.outcome if stage.outcome != "done" else "", time) if part)
    classes = f"box {html.escape(stage.outcome)}{' critical' if critical else ''}"
    whole = f"{stage.id}: {stage.uses}, {stage.outcome}{', ' + time if time else ''}"
    return (
        f"<g><title>{html.escape(whole)}</title>"
        f'<rect class="{classes}" x="{x}" y="{y}" rx="6" width="{BOX_WIDTH}" height="{BOX_HEIGHT}"/>'
        f'<text x="{x + 10}" y="{y + 19}">{SIGNS.get(stage.outcome, "?")} {html.escape(name)}</text>'
        f'<text class=soft x="{x + 10}" y="{y + 36}">{html.escape(about)}</text></g>'
    )


def curve(points: Sequence[tuple[float, float]], title: str, unit: str = "step") -> str:
    """A curve; each of its points is read by hovering.

    Args:
        points: Step and value, by rising steps, two at least.
        title: What it shows.
        unit: What steps are.
    """
    known = [(x, y) for x, y in points if math.isfinite(y)]
    odd = len(points) - len(known)
    if len(known) < 2:
        note = f"{odd} of {len(points)} values are no numbers"
        return f"<figure><figcaption>{html.escape(title)}<small>{note}</small></figcaption></figure>"
    shown = thinned(known)
    low, high = min(y for _, y in known), max(y for _, y in known)
    span = (high - low) or abs(high) or 1.0
    first, last = known[0][0], known[-1][0]

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - first) / (last - first or 1) * (CURVE_WIDTH - LEFT - RIGHT)
        return across, TOP + (high - y) / span * (CURVE_HEIGHT - TOP - BOTTOM)

    line = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in shown)
    dots = "".join(
        '<circle class=hover cx="{:.1f}" cy="{:.1f}" r="4"><title>{}</title></circle>'.format(
            *at(x, y), html.escape(f"{unit} {x:g}: {short(y)}")
        )
        for x, y in shown
    )
    note = f"from {short(known[0][1])} to {short(known[-1][1])}, lowest {short(low)}, highest {short(high)}"
    note += f"; {odd} values are no numbers" if odd else ""
    axis = CURVE_HEIGHT - BOTTOM
    return (
        f"<figure><figcaption>{html.escape(title)}<small>{note}</small></figcaption>"
        f'<svg class=picture viewBox="0 0 {CURVE_WIDTH} {CURVE_HEIGHT}" role=img '
        f'aria-label="{html.escape(f"{title}: {note}")}">'
        f'<line class=axis x1="{LEFT}" x2="{CURVE_WIDTH - RIGHT}" y1="{axis}" y2="{axis}"/>'
        f'<polyline class=curve points="{line}"/>{dots}'
        f'<text class=soft x="{LEFT - 6}" y="{TOP + 10}" text-anchor=end>{short(high)}</text>'
        f'<text class=soft x="{LEFT - 6}" y="{axis}" text-anchor=end>{short(low)}</text>'
        f'<text class=soft x="{LEFT}" y="{CURVE_HEIGHT - 6}">{unit} {first:g}</text>'
        f'<text class=soft x="{CURVE_WIDTH - RIGHT}" y="{CURVE_HEIGHT - 6}" text-anchor=end>{last:g}</text>'
        "</svg></figure>"
    )


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """No more points than are seen: of each stretch the lowest and the highest one, and both ends."""
    if len(points) <= MOST_POINTS:
        return list(points)
    stretches = MOST_POINTS // 2 - 1
    kept: list[tuple[float, float]] = [points[0]]
    for number in range(stretches):
        part = points[1 + number * (len(points) - 2) // stretches : 1 + (number + 1) * (len(points) - 2) // stretches]
        if part:
            ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
            kept += sorted(ends)
    return [*kept, points[-1]]


def forest(rows: Sequence[tuple[str, float, float, float]], title: str, zero: float | None = None) -> str:
    """Values with their intervals, below each other on one scale.

    Args:
        rows: Label, value, lower and upper end.
        title: What they are.
        zero: Where a line is drawn that says "no difference".
    """
    marks = [mark for _, value, low, high in rows for mark in (value, low, high)] + ([] if zero is None else [zero])
    low, high = min(marks), max(marks)
    span = (high - low) or abs(high) or 1.0
    right = FOREST_WIDTH - FOREST_VALUE

    def at(value: float) -> float:
        return FOREST_LABEL + (value - low) / span * (right - FOREST_LABEL - 10)

    height = 8 + FOREST_LINE * len(rows)
    told = "; ".join(f"{label} {_ends(value, least, most)}" for label, value, least, most in rows)
    parts: Iterator[str] = (
        f"<g><title>{html.escape(label)} {_ends(value, least, most)}</title>"
        f'<text x="0" y="{y + 4}">{html.escape(label[:LONG_NAME])}</text>'
        f'<line class=span x1="{at(least):.1f}" x2="{at(most):.1f}" y1="{y}" y2="{y}"/>'
        f'<circle class=mean cx="{at(value):.1f}" cy="{y}" r="4.5"/>'
        f'<text class=soft x="{right}" y="{y + 4}">{_ends(value, least, most)}</text></g>'
        for y, (label, value, least, most) in zip(range(18, height + FOREST_LINE, FOREST_LINE), rows, strict=False)
    )
    line = "" if zero is None else f'<line class=zero x1="{at(zero):.1f}" x2="{at(zero):.1f}" y1="2" y2="{height}"/>'
    return (
        f"<figure class=wide><figcaption>{html.escape(title)}</figcaption><div class=scroll>"
        f'<svg class=picture style="min-width:480px" viewBox="0 0 {FOREST_WIDTH} {height}" role=img '
        f'aria-label="{html.escape(f"{title}: {told}")}">{line}{"".join(parts)}</svg></div></figure>'
    )


def _ends(value: float, low: float, high: float) -> str:
    return f"{short(value)} ({short(low)} to {short(high)})" if low < high else short(value)


def short(value: float) -> str:
    """A number in few letters."""
    if value == 0 or 0.001 <= abs(value) < 10000:
        return f"{value:.3f}".rstrip("0").rstrip(".") if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:.2g}"


def duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def told(value: Any) -> str:
    """A number in few letters; what a plugin gives instead of one, as it is."""
    if value is None:
        return "-"
    return short(float(value)) if isinstance(value, int | float) else str(value)
