"""``luthier show``: what is in the store, and where it came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import click

from luthier.api.artifact import Artifact
from luthier.artifacts.store import Store


@click.command("show", epilog="Example: luthier show support/tuned")
@click.argument("what", required=False)
@click.option("--store", type=click.Path(path_type=Path), help="The store; by default ./.luthier.")
@click.option("--json", "as_json", is_flag=True, help="The whole manifest, or the events of a run.")
def show_command(what: str | None, store: Path | None, as_json: bool) -> None:
    """Show a run (by its id), a stage (RECIPE/STAGE), or an artifact (a key, the beginning of one, a folder).

    Without WHAT, list what is in the store.
    """
    place = Store.at(store)
    if what is None:
        _everything(place)
    elif (place.runs / what / "events.jsonl").exists():
        _run(place.runs / what / "events.jsonl", as_json)
    else:
        found = place.resolve(what)
        if as_json:
            click.echo(json.dumps(found.manifest, indent=2))
        else:
            _artifact(place, found)


def _everything(store: Store) -> None:
    from luthier.reporting.tables import describe

    for key in store.stored_keys():
        artifact = store.find(key)
        if artifact is None:
            click.echo(f"{'?':<20} damaged  {key[:12]}  {store.broken(key)}")
        else:
            click.echo(f"{artifact.manifest['stage']:<20} {describe(artifact)}")
    for path in sorted(store.runs.glob("*")):
        click.echo(f"run {path.name}")


def _run(path: Path, as_json: bool) -> None:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if as_json:
        click.echo("\n".join(lines))
        return
    odd = 0
    for line in lines:
        event = _event_of(line)
        if event is None:
            odd += 1
            continue
        kind, stage = event["event"], event.get("stage", "")
        match kind:
            case "stage_cached" | "stage_skipped" | "stage_started":
                click.echo(f"{stage}: {kind.removeprefix('stage_')}")
            case "stage_finished":
                click.echo(f"{stage}: finished, {event['seconds']['total']:.1f} s, {event['key'][:12]}")
            case "stage_failed" | "stage_interrupted":
                click.echo(f"{stage}: {kind.removeprefix('stage_')}: {event['message']}")
            case "warning":
                click.echo(f"{stage}: warning: {event['message']}")
            case "gate":
                click.echo(
                    f"{stage}: gate {event['metric']} {event['required']}: {event['value']}"
                    f" {'holds' if event['ok'] else 'DOES NOT HOLD'}"
                )
            case "run_finished":
                click.echo(f"ended with exit code {event['exit_code']}")
            case _:
                pass
    if odd:
        click.echo(f"{odd} lines cannot be read: the disk was full, or the run was ended while it wrote them")


FIELDS = {
    "stage_finished": ("stage", "seconds", "key"),
    "stage_failed": ("stage", "message"),
    "stage_interrupted": ("stage", "message"),
    "warning": ("message",),
    "gate": ("stage", "metric", "required", "value", "ok"),
    "run_finished": ("exit_code",),
}
"""What events that are shown say at least."""


def _event_of(line: str) -> dict[str, Any] | None:
    """The event that a line is; None where it was cut off, or is something else."""
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(cast("Any", found).get("event"), str):
        return None
    event = cast("dict[str, Any]", found)
    seconds: Any = event.get("seconds")
    timed = event["event"] != "stage_finished" or (
        isinstance(seconds, dict) and isinstance(cast("Any", seconds).get("total"), int | float)
    )
    return event if timed and all(name in event for name in FIELDS.get(event["event"], ())) else None


def _artifact(store: Store, artifact: Artifact) -> None:
    from rich.markup import escape
    from rich.tree import Tree

    from luthier.cli.display import make_console
    from luthier.reporting.tables import describe, ledger, receipt

    console = make_console()
    manifest = artifact.manifest
    console.print(f"[bold]{escape(manifest['stage'])}[/]  {escape(describe(artifact))}")
    console.print(escape(str(artifact.path)))
    component: Any = manifest.get("component")
    seconds: Any = manifest.get("seconds")
    if component and seconds:
        console.print(f"made by {component['name']} of {component['provider']} in {seconds['total']:.1f} s")
    for warning in manifest["warnings"]:
        console.print(f"[yellow]warning: {escape(warning)}[/]")
    facts = dict(artifact.facts)
    if artifact.kind == "dataset" and (lines := ledger(facts)):
        console.print("\n[bold]rows[/]")
        for line in lines:
            console.print(escape(line))
    training: dict[str, Any] = dict(facts.get("training") or {})
    if lines := receipt(training):
        console.print("\n[bold]training[/] (what is trained stands in \u27e6\u27e7)")
        for line in lines:
            console.print(line)
        facts["training"] = {name: value for name, value in training.items() if name != "first_rows"}
    for title, content in (("facts", facts), ("config", manifest.get("config", {}))):
        console.print(f"\n[bold]{title}[/]")
        console.print(escape(json.dumps(content, indent=2, ensure_ascii=False)))
    tree = Tree(escape(f"{manifest['stage']} ({artifact.kind} {artifact.key[:12]})"))
    _lineage(store, artifact, tree)
    console.print("\n[bold]lineage[/]")
    console.print(tree)


def _lineage(store: Store, artifact: Artifact, tree: Any) -> None:
    for field, keys in artifact.manifest["inputs"].items():
        for key in keys:
            parent = store.find(key)
            if parent is None:
                tree.add(f"{field}: {key[:12]} (no longer in the store)")
                continue
            branch = tree.add(f"{field}: {parent.manifest['stage']} ({parent.kind} {key[:12]})")
            _lineage(store, parent, branch)
