"""Two runs side by side as one HTML page: what was changed, and what came of it."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from luthier.reporting.data_page import whole_page
from luthier.reporting.pictures import STYLE as PICTURES
from luthier.reporting.pictures import duration, short
from luthier.reporting.run_page import STYLE, grid, labels_of, models_of
from luthier.reporting.runs import RunRecord, StageRecord

Flat = dict[str, str]
LONGEST = 300
"""Letters of a setting that are shown."""


def page(first: RunRecord, second: RunRecord) -> str:
    """The whole page."""
    title = f"{first.id} and {second.id}"
    return whole_page(title, "".join(_body(first, second)), PICTURES, STYLE)


def _body(first: RunRecord, second: RunRecord) -> Iterator[str]:
    yield "<h1>Two runs compared</h1><p class=summary>"
    for name, run in (("first", first), ("second", second)):
        yield f"{name}: {html.escape(run.id)}, {html.escape(run.state)}, {duration(run.ended - run.began)}<br>"
    yield "</p><h2>What was changed</h2>"
    rows = [[html.escape(_cut(cell)) for cell in row] for row in changes(first, second)]
    yield grid(["stage", "setting", "first", "second"], rows) if rows else "<p>No setting of a stage.</p>"
    yield "<h2>What was measured</h2>"
    scores = list(_scores(first, second))
    yield (
        grid(["stage", "model", "metric", "first", "second", "change"], scores, (3, 4, 5))
        if scores
        else "<p>Nothing.</p>"
    )
    yield "<h2>How long it took</h2>"
    times: list[list[str]] = []
    for name in dict.fromkeys([*first.stages, *second.stages]):
        pair = [run.stages.get(name) for run in (first, second)]
        times.append([html.escape(name), *(_outcome(stage) for stage in pair)])
    yield grid(["stage", "first", "second"], times)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text):,} letters)"


def _outcome(stage: StageRecord | None) -> str:
    if stage is None:
        return "not in this run"
    time = f", {duration(stage.seconds)}" if stage.seconds is not None and stage.outcome != "cached" else ""
    return html.escape(f"{stage.outcome}{time}")


def changes(first: RunRecord, second: RunRecord) -> list[list[str]]:
    """The settings that differ: stage, setting, and its value in both runs; empty where one has none.

    Args:
        first: A run.
        second: Another one.
    """
    found: list[list[str]] = []
    for name in dict.fromkeys([*first.stages, *second.stages]):
        pair = [run.stages.get(name) for run in (first, second)]
        settings = _settings(pair)
        for key in dict.fromkeys([*settings[0], *settings[1]]):
            values = [some.get(key, "") for some in settings]
            if values[0] != values[1]:
                found.append([name, key, *values])
        known = [stage for stage in pair if stage is not None and stage.key]
        # The same settings, and yet another key: a file, a seed, or a program.
        settled = len(known) == len(pair) and settings[0] == settings[1]
        if settled and known[0].key != known[1].key and not _behind(known[0], first, second):
            found.append([name, "what it was made from (a file, the seed, or a program)", *(s.key[:12] for s in known)])
    return found


def _settings(pair: Sequence[StageRecord | None]) -> list[Flat]:
    """The settings of a stage in both runs; where one of them did not tell them, what made the artifacts."""
    told = [stage is None or bool(stage.uses) for stage in pair]
    made = [stage.artifact for stage in pair if stage is not None and stage.artifact is not None]
    if not all(told) and len(made) == len(pair):
        return [_flat({"uses": item.manifest["component"]["name"], **item.manifest["config"]}) for item in made]
    return [{} if stage is None else _flat({"uses": stage.uses, **stage.config}) for stage in pair]


def _behind(stage: StageRecord, first: RunRecord, second: RunRecord) -> bool:
    """Whether a stage that it waits for differs, which says why it does."""
    return any(
        first.stages[name].key != second.stages[name].key
        for name in stage.waits_for
        if name in first.stages and name in second.stages
    )


def _flat(value: Mapping[str, Any], before: str = "") -> Flat:
    """Settings by their paths."""
    found: Flat = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            found |= _flat(item, f"{before}{key}.")
        else:
            found[f"{before}{key}"] = item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)
    return found


def _scores(first: RunRecord, second: RunRecord) -> Iterator[list[str]]:
    for name in dict.fromkeys([*first.stages, *second.stages]):
        pair = [_measured(run.stages.get(name)) for run in (first, second)]
        for key in dict.fromkeys([*pair[0], *pair[1]]):
            values = [some.get(key) for some in pair]
            told = ["-" if value is None else short(value) for value in values]
            change = "" if values[0] is None or values[1] is None else f"{values[1] - values[0]:+.3g}"
            yield [html.escape(name), html.escape(key[0]), html.escape(key[1]), *told, change]


def _measured(stage: StageRecord | None) -> dict[tuple[str, str], float]:
    """What a stage measured, by model and metric."""
    if stage is None or stage.artifact is None:
        return {}
    facts = stage.artifact.facts
    return {
        (label, metric): float(value)
        for label, model in zip(labels_of(stage, facts), models_of(facts), strict=True)
        for metric, value in model["scores"].items()
        if isinstance(value, int | float)
    }
