"""How a run looks: plain lines when piped, a progress bar on a terminal, and a summary at the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from luthier.api.execution import Event
from luthier.planning import Node
from luthier.reporting.tables import certainty, describe, files_table, number, report_table
from luthier.running.runner import RunResult

WIDE = 160
MARKS = {"cached": "=", "done": "+", "failed": "x", "skipped": "-", "interrupted": "!"}
STYLES = {"cached": "cyan", "done": "green", "failed": "bold red", "skipped": "dim", "interrupted": "yellow"}


def make_console(*, stderr: bool = False) -> Console:
    """A console that never folds lines when its output is piped."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=WIDE, soft_wrap=True)


EVERY = 10.0
"""Seconds between lines of metrics where output is piped."""
SHOWN = (("loss", "loss", ".4g"), ("learning_rate", "lr", ".2g"), ("tokens_per_second", "tokens/s", ".0f"))
"""The metrics of the live line, what it calls them, and how it writes them."""


class Display:
    """A listener of a run's events, and a context manager around it.

    Args:
        console: Where it is shown.
        clock: Gives seconds.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console
        self._clock = clock
        self._said: dict[str, float] = {}
        self._held: dict[str, str] = {}
        self._began: dict[str, tuple[float, int]] = {}
        self._total: dict[str, int] = {}
        # On a terminal the progress bar has to know of every line; piped, warnings belong to stderr.
        self._warnings = console if console.is_terminal else make_console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]} {task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        stage = str(event.get("stage", ""))
        match event["event"]:
            case "stage_started":
                self._say(stage, f"{event['status']} ({event['reason']})")
                self._tasks[stage] = self._progress.add_task(escape(stage), total=None, unit="", note="")
            case "progress" if stage in self._tasks:
                if event["unit"] == "steps":
                    self._total[stage] = event["total"]
                self._progress.update(
                    self._tasks[stage], completed=event["done"], total=event["total"], unit=escape(event["unit"])
                )
            case "metrics":
                self._metrics(stage, event)
                self._began.setdefault(stage, (self._clock(), event["step"]))
            case "log":
                self._say(stage, event["message"])
            case "warning":
                self._say(stage, f"warning: {event['message']}", "yellow", self._warnings)
            case "gate":
                held = "holds" if event["ok"] else "DOES NOT HOLD"
                text = f"gate {event['metric']} {event['required']}: {event['value']} {held}"
                self._say(stage, text, "green" if event["ok"] else "bold red")
            case "stage_finished" | "stage_failed" | "stage_interrupted":
                if stage in self._held:
                    self._say(stage, self._held.pop(stage))
                if stage in self._tasks:
                    self._progress.remove_task(self._tasks.pop(stage))
            case _:
                pass

    def _metrics(self, stage: str, event: Event) -> None:
        found: dict[str, float] = event["values"]
        if self.console.is_terminal:
            shown = [f"{text} {number(found[name], form)}" for name, text, form in SHOWN if name in found]
            if stage in self._tasks and "loss" in found:
                self._progress.update(self._tasks[stage], note=", ".join(shown))
            return
        values = ", ".join(f"{name} {number(value, '.4g')}" for name, value in found.items())
        line = f"step {event['step']}: {values}{self._left(stage, event['step'])}"
        # The first, then a line in ten seconds; the last one that was held back comes when the stage ends.
        if self._clock() - self._said.get(stage, -EVERY) >= EVERY:
            self._said[stage] = self._clock()
            self._held.pop(stage, None)
            self._say(stage, line)
        else:
            self._held[stage] = line

    def _left(self, stage: str, step: int) -> str:
        """How long it takes on, in words."""
        began, total = self._began.get(stage), self._total.get(stage)
        if began is None or total is None or not began[1] < step < total:
            return ""
        seconds = (self._clock() - began[0]) / (step - began[1]) * (total - step)
        return f", {timedelta(seconds=round(seconds))} left"

    def _say(self, stage: str, text: str, style: str = "", console: Console | None = None) -> None:
        head = f"{escape(stage)}: " if stage else ""
        body = f"[{style}]{escape(text)}[/]" if style else escape(text)
        (console or self.console).print(head + body)


def summarize(result: RunResult, console: Console) -> None:
    """A line per stage, then tables of reports, files of exports, and errors."""
    console.print()
    grid = Table.grid(padding=(0, 2))
    for name, stage in result.stages.items():
        made = describe(stage.artifact) if stage.artifact else ""
        mark = f"[{STYLES[stage.outcome]}]{MARKS[stage.outcome]} {stage.outcome}[/]"
        grid.add_row(escape(name), mark, f"{stage.seconds:7.1f} s", escape(made))
    console.print(grid)
    for name, stage in result.stages.items():
        if stage.artifact is not None and "table" in stage.artifact.facts:
            console.print()
            console.print(report_table(name, stage.artifact.facts["table"], _labels(stage.node)))
            for line in certainty(dict(stage.artifact.facts), _labels(stage.node)):
                console.print(f"  {escape(line)}", style="dim")
    for name, stage in result.stages.items():
        if stage.artifact is not None and stage.artifact.kind == "export":
            console.print(f"\n[bold]{escape(name)}[/]  {escape(str(stage.artifact.path))}", soft_wrap=True)
            console.print(files_table(stage.artifact))
    for name, stage in result.stages.items():
        if stage.error is not None:
            text = str(stage.error) if stage.error.where == name else f"{name}: {stage.error}"
            make_console(stderr=True).print(f"\n[bold red]error:[/] {escape(text)}")


def _labels(node: Node) -> list[str]:
    """What the recipe calls the measured models today: artifacts keep the name under which they were first made."""
    return [*node.inputs.get("model", []), *node.inputs.get("against", [])]
