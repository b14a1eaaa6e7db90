"""Small charts as SVG, without scripts: they are read by hovering, by a screen reader, in print and without colours."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

WIDTH, HEIGHT, LEFT, BOTTOM = 460, 150, 8, 22
BINS = 24
STYLE = """
.chart { max-width: 100%; height: auto; }
.chart .bar { fill: var(--bar); }
.chart .bar:hover { fill: var(--strong); }
.chart text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.chart line { stroke: var(--line); }
"""
"""What a page has to say of its charts; it defines the colours ``--bar``, ``--strong``, ``--soft``, ``--line``."""


def histogram(values: np.ndarray, title: str) -> str:
    """How numbers are spread, over bins whose edges grow like powers where the numbers span several.

    Args:
        values: Numbers from 0 up.
        title: What they are.
    """
    low, high = float(values.min()), float(values.max())
    if low == high:
        return f"<div class=card>{bars({f'{low:,.0f}': len(values)}, title)}</div>"
    powers = False
    whole = high - low < BINS
    if whole:
        edges = np.arange(low, high + 2) - 0.5
    elif powers := high > 50 * max(1.0, float(np.median(values))):
        edges = np.unique(np.round(np.geomspace(max(1.0, low), high + 1, BINS + 1)))
        edges[0] = min(edges[0], low)
    else:
        edges = np.linspace(low, high, BINS + 1)
    counts, _ = np.histogram(values, edges)
    names = [
        f"{start + 0.5:,.0f}" if whole else f"{start:,.0f} to {end:,.0f}" for start, end in pairwise(edges.tolist())
    ]
    middle = f"median {np.median(values):,.0f}, 95 % up to {np.percentile(values, 95):,.0f}, longest {high:,.0f}"
    middle += ", each bar wider than the one before" if powers else ""
    return _svg(dict(zip(names, counts.tolist(), strict=True)), title, middle, [f"{low:,.0f}", f"{high:,.0f}"])


def bars(counts: Mapping[str, int], title: str) -> str:
    """How often each of a few names occurs, as lines with a bar each."""
    whole = max(1, sum(counts.values()))
    most = max([1, *counts.values()])
    rows = "".join(
        f"<tr><th scope=row>{html.escape(name)}</th><td class=number>{count:,}</td><td class=number>{count / whole:.0%}"
        f'</td><td class=wide><span class=line style="width:{100 * count / most:.1f}%"></span></td></tr>'
        for name, count in counts.items()
    )
    return f"<table class=bars><caption>{html.escape(title)}</caption>{rows}</table>"


def _svg(counts: Mapping[str, int], title: str, note: str, ends: Sequence[str]) -> str:
    most = max(1, *counts.values())
    room = HEIGHT - BOTTOM - 6
    step = (WIDTH - 2 * LEFT) / len(counts)
    parts: list[str] = []
    for place, (name, count) in enumerate(counts.items()):
        tall = room * count / most
        # The lowest bar of something is seen, too.
        tall = max(tall, 1.5) if count else 0
        told = html.escape(f"{name}: {count:,} rows")
        parts.append(
            f'<rect class=bar x="{LEFT + place * step + 0.5:.1f}" y="{HEIGHT - BOTTOM - tall:.1f}" '
            f'width="{max(1.0, step - 1):.1f}" height="{tall:.1f}"><title>{told}</title></rect>'
        )
    axis = HEIGHT - BOTTOM
    return (
        f"<figure><figcaption>{html.escape(title)}<small>{html.escape(note)}</small></figcaption>"
        f'<svg class=chart viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="{html.escape(f"{title}: {note}")}">'
        f'{"".join(parts)}<line x1="{LEFT}" x2="{WIDTH - LEFT}" y1="{axis}" y2="{axis}"/>'
        f'<text x="{LEFT}" y="{HEIGHT - 6}">{html.escape(ends[0])}</text>'
        f'<text x="{WIDTH - LEFT}" y="{HEIGHT - 6}" text-anchor="end">{html.escape(ends[1])}</text></svg></figure>'
    )
