"""The report as one HTML page: a heat map with a row for each parameter."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

STYLE = """
body { font: 14px system-ui, sans-serif; margin: 2em; color: #222; }
table { border-collapse: collapse; margin: 1em 0 2em; }
th, td { padding: 3px 10px; text-align: right; font-variant-numeric: tabular-nums; }
th { position: sticky; top: 0; background: #fff; border-bottom: 1px solid #999; font-weight: 600; }
td:first-child, th:first-child { text-align: left; white-space: nowrap; }
.note { max-width: 60em; color: #555; }
"""


def page(report: Mapping[str, Any]) -> str:
    """The whole page; it needs nothing from elsewhere."""
    base = report["base"]
    what = f"their task vectors, the differences to {base}" if base else "their weights"
    title = " and ".join(report["models"])
    sections = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p class=note>Compared are {html.escape(what)}. Cosine: 1 is the same direction, 0 unrelated, -1 opposite. "
        "Same sign: of the entries that neither has at zero, the share whose signs agree. Norm: the length, relative "
        f"to that of {html.escape(base or report['models'][0])}.</p>",
        "<h2>Layers</h2>",
        _table({"whole model": report["whole"], **report["layers"]}),
        "<h2>Parameters</h2>",
        _table(report["tensors"]),
    ]
    head = f"<meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(sections)}</body></html>\n"


def _table(rows: Mapping[str, Mapping[str, float | None]]) -> str:
    columns = list(next(iter(rows.values())))
    largest = {column: max((row[column] or 0.0 for row in rows.values()), default=1.0) or 1.0 for column in columns}
    head = "".join(f"<th>{html.escape(column)}</th>" for column in ["", *columns])
    body = "".join(
        f"<tr><td>{html.escape(name)}</td>{''.join(_cell(column, row[column], largest) for column in columns)}</tr>"
        for name, row in rows.items()
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(column: str, value: float | None, largest: Mapping[str, float]) -> str:
    """A number on its colour: red below the middle, blue above it; norms in greys."""
    if value is None:
        return "<td>-</td>"
    if column.startswith("norm"):
        colour = f"rgba(60, 60, 60, {0.45 * max(0.0, value / largest[column]):.3f})"
    else:
        away = value if column.startswith("cosine") else 2 * value - 1
        strength = 0.75 * min(1.0, abs(away))
        colour = f"rgba(33, 102, 172, {strength:.3f})" if away >= 0 else f"rgba(178, 24, 43, {strength:.3f})"
    return f'<td style="background: {colour}">{value:.4f}</td>'
