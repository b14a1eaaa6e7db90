"""How a run looks: plain lines when piped, a progress bar on a terminal, and a summary at the end."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from luthier.api.artifact import Artifact
from luthier.planning import Node
from luthier.running.events import Event
from luthier.running.runner import RunResult

WIDE = 160
SMALL = 0.01
"""Numbers below this are shown by their digits."""
MARKS = {"cached": "=", "done": "+", "failed": "x", "skipped": "-", "interrupted": "!"}
STYLES = {"cached": "cyan", "done": "green", "failed": "bold red", "skipped": "dim", "interrupted": "yellow"}


def make_console(*, stderr: bool = False) -> Console:
    """A console that never folds lines when its output is piped."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=WIDE, soft_wrap=True)


class Display:
    """A listener of a run's events, and a context manager around it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        # On a terminal the progress bar has to know of every line; piped, warnings belong to stderr.
        self._warnings = console if console.is_terminal else make_console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]} {task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None

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
                self._task = self._progress.add_task(escape(stage), total=None, unit="", note="")
            case "progress" if self._task is not None:
                self._progress.update(
                    self._task, completed=event["done"], total=event["total"], unit=escape(event["unit"])
                )
            case "metrics":
                self._metrics(stage, event)
            case "log":
                self._say(stage, event["message"])
            case "warning":
                self._say(stage, f"warning: {event['message']}", "yellow", self._warnings)
            case "gate":
                held = "holds" if event["ok"] else "DOES NOT HOLD"
                text = f"gate {event['metric']} {event['required']}: {event['value']} {held}"
                self._say(stage, text, "green" if event["ok"] else "bold red")
            case "stage_finished" | "stage_failed" | "stage_interrupted":
                if self._task is not None:
                    self._progress.remove_task(self._task)
                    self._task = None
            case _:
                pass

    def _metrics(self, stage: str, event: Event) -> None:
        values = ", ".join(f"{name} {_number(value, '.4g')}" for name, value in event["values"].items())
        if not self.console.is_terminal:
            self._say(stage, f"step {event['step']}: {values}")
        elif self._task is not None and "loss" in event["values"]:
            self._progress.update(self._task, note=f"loss {_number(event['values']['loss'], '.4g')}")

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
            console.print(_report(name, stage.artifact.facts["table"], _labels(stage.node)))
    for name, stage in result.stages.items():
        if stage.artifact is not None and stage.artifact.kind == "export":
            console.print(f"\n[bold]{escape(name)}[/]  {escape(str(stage.artifact.path))}", soft_wrap=True)
            console.print(_files(stage.artifact))
    for name, stage in result.stages.items():
        if stage.error is not None:
            text = str(stage.error) if stage.error.where == name else f"{name}: {stage.error}"
            make_console(stderr=True).print(f"\n[bold red]error:[/] {escape(text)}")


def describe(artifact: Artifact) -> str:
    """One line about what an artifact is."""
    facts = artifact.facts
    head = f"{artifact.kind} {artifact.key[:12]}"
    match artifact.kind:
        case "dataset":
            rows = ", ".join(f"{_number(count, ',')} {split}" for split, count in facts.get("rows", {}).items())
            return f"{head}  {facts.get('format', '?')}: {rows}"
        case "model":
            size = f"{facts.get('parameters', 0) / 1e6:.1f} M {facts.get('dtype', '?')}"
            return f"{head}  {facts.get('architecture', '?')}, {size}{_loss(facts)}"
        case "adapter":
            return f"{head}  {facts.get('adapter', '?')}, r={facts.get('r', '?')}{_loss(facts)}"
        case "export":
            return f"{head}  {facts.get('format', '?')}: {', '.join(facts.get('files', {}))}"
        case "report":
            scores = facts.get("scores", {})
            told = ", ".join(f"{name} {_number(value, '.3f')}" for name, value in scores.items())
            return f"{head}  {told}"


def _number(value: Any, form: str) -> str:
    """A number in a format; what a plugin gives instead of one, as it is."""
    if value is None:
        return "-"
    return format(value, form) if isinstance(value, (int, float)) else str(value)


def _loss(facts: dict[str, Any]) -> str:
    training: dict[str, Any] = facts.get("training") or {}
    if "loss_first" not in training:
        return ""
    return f", loss {_number(training['loss_first'], '.3g')} -> {_number(training['loss_last'], '.3g')}"


def _labels(node: Node) -> list[str]:
    """What the recipe calls the measured models today: artifacts keep the name under which they were first made."""
    return [*node.inputs.get("model", []), *node.inputs.get("against", [])]


def _report(name: str, content: dict[str, Any], labels: list[str]) -> Table:
    table = Table(title=escape(name), title_justify="left", box=None, padding=(0, 2), title_style="bold")
    table.add_column("model")
    for column in content["columns"]:
        table.add_column(escape(column), justify="right")
    rows: list[list[Any]] = content["rows"]
    for place, (known, *values) in enumerate(rows):
        label = str(known)
        if len(labels) == len(rows):
            # A report may say more than the name, such as the file of an export.
            label = f"{labels[place]} {label.partition(' ')[2]}".rstrip()
        table.add_row(escape(label), *(_number(value, _form(value)) for value in values))
    return table


def _form(value: Any) -> str:
    """Three decimals, or two digits of what would be nothing but zeros."""
    return "#.2g" if isinstance(value, float) and 0 < abs(value) < SMALL else ".3f"


def _files(export: Artifact) -> Table:
    table = Table(box=None, padding=(0, 2))
    table.add_column("file")
    table.add_column("size", justify="right")
    table.add_column("KL to the model", justify="right")
    for name, about in export.facts["files"].items():
        kl = f"{about['kl']:.2g} nats" if "kl" in about else ""
        size = f"{about['bytes'] / 1e6:.2f} MB" if "bytes" in about else ""
        table.add_row(escape(str(about.get("file", name))), size, kl)
    return table
