"""``luthier report`` and ``luthier runs``."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from luthier.artifacts.store import Store


@click.command("report", epilog="Example: luthier report support -o support.html")
@click.argument("runs", nargs=-1, required=True, metavar="RUN [OTHER]")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The file; by default RUN.html.")
@click.option("--store", type=click.Path(path_type=Path), help="The store; by default ./.luthier.")
def report_command(runs: tuple[str, ...], output: Path | None, store: Path | None) -> None:
    """Write one HTML page about a run: its stages and the critical path, data, training, evaluation with intervals,
    examples, exports, and every setting and version. It needs no network, and can be sent to somebody.

    RUN is a run's id, the beginning of one, or a recipe's name for its last run. With two of them, the page says what
    differs between them.
    """
    from luthier.reporting.compare_page import page as compared
    from luthier.reporting.run_page import page
    from luthier.reporting.runs import found_run, read_run

    if len(runs) > 2:
        raise click.BadParameter("name one run, or two to compare", param_hint="RUN")
    place = Store.at(store)
    ids = [found_run(place, text) for text in runs]
    records = [read_run(place, run) for run in ids]
    text = page(records[0]) if len(records) == 1 else compared(*records)
    file = output or Path(f"{'-and-'.join(ids)}.html")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    click.echo(f"{file}  ({file.stat().st_size / 1e3:,.0f} kB)")


@click.command("runs", epilog="Example: luthier runs --recipe support")
@click.option("--recipe", help="Only those of this recipe.")
@click.option("--store", type=click.Path(path_type=Path), help="The store; by default ./.luthier.")
@click.option("--json", "as_json", is_flag=True, help="JSON for machines.")
def runs_command(recipe: str | None, store: Path | None, as_json: bool) -> None:
    """List runs, the newest first: when, how they ended, how long they took, and what was measured."""
    from rich.markup import escape
    from rich.table import Table

    from luthier.cli.display import make_console
    from luthier.reporting.pictures import duration, told
    from luthier.reporting.runs import read_run, run_ids

    place = Store.at(store)
    records = [read_run(place, run, curves=False) for run in run_ids(place)]
    records = [run for run in records if recipe is None or run.recipe == recipe]
    found: list[dict[str, Any]] = [
        {
            "run": run.id,
            "recipe": run.recipe,
            "began": run.began,
            "seconds": run.ended - run.began,
            "state": run.state,
            "exit_code": run.exit_code,
            "stages": {name: stage.outcome for name, stage in run.stages.items()},
            "scores": {
                name: stage.artifact.facts["scores"]
                for name, stage in run.stages.items()
                if stage.artifact is not None and isinstance(stage.artifact.facts.get("scores"), dict)
            },
        }
        for run in records
    ]
    if as_json:
        click.echo(json.dumps(found))
        return
    if not found:
        which = "no runs yet" if recipe is None else f"no runs of '{recipe}'"
        click.echo(f"{which}: `luthier run RECIPE` makes one")
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("run", "begun", "took", "ended", "measured"):
        table.add_column(column, overflow="fold")
    for run in found:
        scores = "; ".join(
            f"{stage}: " + ", ".join(f"{name} {told(value)}" for name, value in some.items())
            for stage, some in run["scores"].items()
        )
        when = datetime.fromtimestamp(run["began"]).strftime("%Y-%m-%d %H:%M")
        style = "" if run["state"] in ("done", "running") else "red"
        ended = f"[{style}]{run['state']}[/]" if style else run["state"]
        table.add_row(escape(run["run"]), when, duration(run["seconds"]), ended, escape(scores))
    make_console().print(table)
