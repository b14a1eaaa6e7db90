"""The examination of a dataset as one HTML page, which needs nothing from elsewhere."""

from __future__ import annotations

import html
from collections.abc import Iterator

from luthier.data.examine import Examination, Finding
from luthier.reporting.charts import STYLE as CHARTS
from luthier.reporting.charts import bars, histogram

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --paper: #fff; --card: #f6f8fa; --line: #d1d9e0;
  --bar: #5b8def; --strong: #1f5fd0; --warn: #9a6700; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --paper: #0d1117; --card: #161b22;
  --line: #3d444d; --bar: #4c7fe0; --strong: #8ab4ff; --warn: #d29922; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  padding: 1.5rem; max-width: 68rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
figure, .card { margin: 0; padding: .8rem; background: var(--card); border: 1px solid var(--line); border-radius: 6px; }
figcaption, caption { font-weight: 600; text-align: left; } figcaption small { display: block; font-weight: 400;
  color: var(--soft); }
table { border-collapse: collapse; width: 100%; }
th[scope=row] { font-weight: 400; text-align: left; padding-right: 1rem; }
td { vertical-align: top; } .number { text-align: right; font-variant-numeric: tabular-nums; padding-right: .8rem;
  white-space: nowrap; width: 1%; }
.wide { width: 60%; }
.line { display: block; height: .7rem; margin-top: .4rem; background: var(--bar); min-width: 2px; }
.finding { margin: 0 0 .8rem; } .finding > summary { cursor: pointer; } .finding b { color: var(--warn); }
.finding p { margin: .4rem 0; color: var(--soft); }
.place { width: 1%; white-space: nowrap; padding-right: 1rem; color: var(--soft); } .text { overflow-wrap: anywhere; }
.summary { color: var(--soft); margin: 0; }
@media (max-width: 40rem) { body { padding: .8rem; } .place { white-space: normal; } }
@media print { .finding { break-inside: avoid; } body { max-width: none; } }
"""


OPEN = 3
"""Findings whose rows are shown without a click."""
LEAST = 0.01
"""The share of rows that a language has which is named."""


def page(found: Examination) -> str:
    """The whole page."""
    title = f"Dataset: {found.name}"
    rows = ", ".join(f"{count:,} {split}" for split, count in found.rows.items())
    return whole_page(title, "".join(_body(found, title, rows)), CHARTS)


def whole_page(title: str, body: str, *styles: str, behind: str = "") -> str:
    """A page that needs nothing from elsewhere.

    Args:
        title: What a browser calls it.
        body: Its HTML.
        styles: Style sheets beside the one that all pages have.
        behind: What follows the body, such as scripts.
    """
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}{''.join(styles)}</style></head>"
        f"<body><main>{body}</main>{behind}</body></html>\n"
    )


def _body(found: Examination, title: str, rows: str) -> Iterator[str]:
    yield f"<h1>{html.escape(title)}</h1><p class=summary>{html.escape(found.schema)}: {rows}</p>"
    yield f"<h2>What is odd ({len(found.findings)})</h2>"
    if not found.findings:
        yield "<p>Nothing that this report looks for.</p>"
    for place, finding in enumerate(found.findings):
        yield _finding(finding, shown=place < OPEN)
    yield "<h2>What rows are like</h2><div class=charts>"
    for name, values in found.lengths.items():
        yield histogram(values, name[0].upper() + name[1:])
    if found.roles:
        yield f"<div class=card>{bars(dict(found.roles.most_common()), 'Turns by role')}</div>"
    if found.languages:
        yield f"<div class=card>{bars(_languages(found), 'Languages, as guessed')}</div>"
    yield "</div>"
    if found.ledger:
        yield "<h2>Where rows came from, and what became of them</h2><div class=card><table>"
        for what, count in found.ledger:
            yield f"<tr><td class=number>{count:+,}</td><td>{html.escape(what)}</td></tr>"
        yield "</table></div>"


def _languages(found: Examination) -> dict[str, int]:
    """How many rows each language has; those of a few rows alone are mostly wrong guesses."""
    whole = found.languages.total()
    known = {name: count for name, count in found.languages.most_common() if count >= LEAST * whole}
    others = whole - sum(known.values())
    return {**known, "others": others} if others else known


def _finding(finding: Finding, *, shown: bool) -> str:
    examples = "".join(
        f"<tr><td class=place>{html.escape(item.place)}</td><td class=text>{html.escape(item.text)}</td></tr>"
        for item in finding.examples
    )
    share = f"{finding.count / finding.of:.1%} of {finding.of:,}" if finding.of else ""
    opened = " open" if shown else ""
    return (
        f"<details class='finding card'{opened}><summary>{html.escape(finding.name)}: <b>{finding.count:,}</b> "
        f"<small>({share})</small></summary><p>{html.escape(finding.advice)}</p><table>{examples}</table></details>"
    )
