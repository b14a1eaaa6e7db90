"""What is known of runs afterwards: read from the events that they wrote, and from the store."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from luthier.api.artifact import Artifact
from luthier.api.errors import StoreError
from luthier.artifacts.store import Store

EVENTS = "events.jsonl"
State = Literal["running", "done", "failed", "gate", "interrupted", "broken off"]
SILENT = 2 * 3600.0
"""Seconds after which a run that says nothing, and did not end, is taken for broken off."""


@dataclass(slots=True)
class StageRecord:
    """What a run made of a stage.

    Attributes:
        id: The stage.
        uses: Its component; empty where the run did not say.
        produces: The kind of its artifact.
        key: The key of its artifact.
        waits_for: The stages before it.
        config: What the recipe says of it, defaults left out.
        outcome: How it ended; ``waiting`` where it was not reached, ``running`` where it did not end.
        began: When it began, in seconds since 1970; None where it did not.
        seconds: How long it took; of a cached stage, how long the run took that made it.
        message: What went wrong.
        gates: Its gates: metric, required, value, ok.
        warnings: What it warned of.
        artifact: What it made, where it is in the store.
        curve: Its metrics: step and values, of this run and those that it continued.
    """

    id: str
    uses: str = ""
    produces: str = ""
    key: str = ""
    waits_for: list[str] = field(default_factory=list[str])
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    outcome: str = "waiting"
    began: float | None = None
    seconds: float | None = None
    message: str = ""
    gates: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    warnings: list[str] = field(default_factory=list[str])
    artifact: Artifact | None = None
    curve: list[tuple[int, dict[str, float]]] = field(default_factory=list[tuple[int, dict[str, float]]])


@dataclass(slots=True)
class RunRecord:
    """What is known of a run.

    Attributes:
        id: Its id.
        recipe: The recipe's name.
        began: When it began, in seconds since 1970.
        ended: When it said something last.
        state: How it ended.
        exit_code: Its exit code; None where it did not end.
        stages: Its stages, in an order in which they can run.
        unread: Lines of its events that cannot be read.
    """

    id: str
    recipe: str = ""
    began: float = 0.0
    ended: float = 0.0
    state: State = "broken off"
    exit_code: int | None = None
    stages: dict[str, StageRecord] = field(default_factory=dict[str, StageRecord])
    unread: int = 0

    @property
    def critical_path(self) -> list[str]:
        """The stages one behind another that took longest, and below which the run cannot get with any number of
        slots; cached ones took no time."""
        longest: dict[str, tuple[float, str | None]] = {}
        for stage in self.stages.values():
            before = [(longest[name][0], name) for name in stage.waits_for if name in longest]
            time, last = max(before, default=(0.0, None))
            own = 0.0 if stage.outcome == "cached" else stage.seconds or 0.0
            longest[stage.id] = (time + own, last)
        path: list[str] = []
        at = max(longest, key=lambda name: longest[name][0], default=None)
        while at is not None and longest[at][0] > 0:
            path.append(at)
            at = longest[at][1]
        return path[::-1]


def run_ids(store: Store) -> list[str]:
    """The ids of all runs in a store, the newest first."""
    found = [path.parent for path in store.runs.glob(f"*/{EVENTS}")]
    return [path.name for path in sorted(found, key=lambda path: path.name[:15], reverse=True)]


def found_run(store: Store, text: str) -> str:
    """The run that is meant by its id, an unambiguous beginning of it, or a recipe's name for its last one.

    Raises:
        StoreError: there is none, or there are several.
    """
    ids = run_ids(store)
    named = [name for name in ids if _recipe_of(name) == text]
    if named:
        return named[0]
    begun = [name for name in ids if name == text] or [name for name in ids if name.startswith(text)]
    if len(begun) == 1:
        return begun[0]
    what = f"{len(begun)} runs begin with" if begun else "no run, and no recipe that was run, is called"
    raise StoreError(f"{what} '{text}'", where=str(store.root), hint="see `luthier runs` for what there is")


def read_run(store: Store, run: str, *, curves: bool = True) -> RunRecord:
    """What is known of a run.

    Args:
        store: The store.
        run: Its id.
        curves: Whether the metrics of its stages are wanted; of cached stages they are in earlier runs.
    """
    record = RunRecord(run, _recipe_of(run))
    for event in _events(store.runs / run / EVENTS, record):
        _take(record, event)
    if record.exit_code is not None:
        record.state = _STATES.get(record.exit_code, "failed")
    elif _seconds_since(store.runs / run / EVENTS) < SILENT:
        record.state = "running"
    for stage in record.stages.values():
        stage.artifact = store.find(stage.key) if stage.key else None
        if stage.artifact is not None:
            about = stage.artifact.manifest
            stage.warnings = stage.warnings or list(about.get("warnings") or [])
            if stage.seconds is None:
                stage.seconds = float((about.get("seconds") or {}).get("total") or 0.0)
    if curves:
        _add_curves(store, record)
    return record


_STATES: dict[int, State] = {0: "done", 1: "failed", 3: "gate", 130: "interrupted"}


def _recipe_of(run: str) -> str:
    """The recipe's name in a run's id: date-time-name-process."""
    return "-".join(run.split("-")[2:-1])


def _seconds_since(path: Path) -> float:
    import time

    return time.time() - path.stat().st_mtime


def _events(path: Path, record: RunRecord) -> Iterator[dict[str, Any]]:
    """The events of a run; lines that were cut off are counted."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                found: Any = json.loads(line)
            except (ValueError, RecursionError):
                record.unread += 1
                continue
            if isinstance(found, dict) and isinstance(cast("Any", found).get("event"), str):
                yield cast("dict[str, Any]", found)
            else:
                record.unread += 1


def _take(record: RunRecord, event: Mapping[str, Any]) -> None:
    """Add to a record what an event says."""
    time = event.get("time")
    if isinstance(time, int | float):
        record.began = record.began or float(time)
        record.ended = float(time)
    kind, name = event["event"], event.get("stage")
    if kind == "run_started":
        record.recipe = str(event.get("recipe") or record.recipe)
        plan: Any = event.get("plan") or {stage: {} for stage in event.get("stages") or ()}
        for stage, about in cast("dict[str, dict[str, Any]]", plan).items():
            record.stages[stage] = StageRecord(stage, **about)
        return
    if kind == "run_finished":
        record.exit_code = event.get("exit_code")
        return
    if not isinstance(name, str):
        return
    stage = record.stages.setdefault(name, StageRecord(name))
    stage.key = str(event.get("key") or stage.key)
    match kind:
        case "stage_started":
            stage.outcome, stage.began = "running", record.ended
        case "stage_cached":
            stage.outcome = "cached"
        case "stage_skipped":
            stage.outcome = "skipped"
        case "stage_finished":
            seconds: Any = event.get("seconds")
            stage.outcome = "done"
            stage.seconds = float(seconds["total"]) if isinstance(seconds, dict) and "total" in seconds else None
        case "stage_failed" | "stage_interrupted":
            stage.outcome = kind.removeprefix("stage_")
            stage.message = str(event.get("message") or "")
            stage.seconds = None if stage.began is None else record.ended - stage.began
        case "warning":
            stage.warnings.append(str(event.get("message") or ""))
        case "gate":
            stage.gates.append({part: event.get(part) for part in ("metric", "required", "value", "ok")})
        case _:
            pass


def _add_curves(store: Store, record: RunRecord) -> None:
    """Put together what the runs logged that made each artifact: one that was interrupted was continued by another."""
    wanted = {stage.key: stage for stage in record.stages.values() if stage.key}
    points: dict[str, dict[int, dict[str, float]]] = {key: {} for key in wanted}
    for run in reversed(run_ids(store)):
        if run[:15] > record.id[:15]:
            break
        keys: dict[str, str] = {}
        for event in _events(store.runs / run / EVENTS, RunRecord(run)):
            name = event.get("stage")
            if event["event"] == "stage_started" and event.get("key"):
                keys[str(name)] = str(event["key"])
            elif event["event"] == "metrics" and keys.get(str(name)) in points:
                values, step = event.get("values"), event.get("step")
                if isinstance(values, dict) and isinstance(step, int):
                    # What was made again from a checkpoint replaces what was lost.
                    numbers = {k: float(v) for k, v in cast("Any", values).items() if isinstance(v, int | float)}
                    points[keys[str(name)]].setdefault(step, {}).update(numbers)
    for key, stage in wanted.items():
        stage.curve = sorted(points[key].items())
