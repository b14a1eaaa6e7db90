"""``luthier show``: what is in the store."""

from __future__ import annotations

import json
from pathlib import Path

import click

from luthier.api.artifact import Artifact
from luthier.artifacts.store import Store


@click.command("show", epilog="Example: luthier show 3fa9c1d2")
@click.argument("artifact", required=False)
@click.option("--store", type=click.Path(path_type=Path), help="The store; by default ./.luthier.")
@click.option("--json", "as_json", is_flag=True, help="The whole manifest.")
def show_command(artifact: str | None, store: Path | None, as_json: bool) -> None:
    """Show an artifact (by key, the beginning of one, or folder) with its lineage; without one, all of them."""
    place = Store.at(store)
    if artifact is None:
        for item in place:
            click.echo(f"{item.key[:12]}  {item.kind:<8} {item.manifest['stage']}")
        return
    found = place.resolve(artifact)
    if as_json:
        click.echo(json.dumps(found.manifest, indent=2))
        return
    click.echo(f"{found.kind} {found.key}\n{found.path}\n{json.dumps(found.facts, indent=2)}")
    click.echo("made from:")
    _lineage(place, found, 1)


def _lineage(store: Store, artifact: Artifact, depth: int) -> None:
    for field, keys in artifact.manifest["inputs"].items():
        for key in keys:
            parent = store.find(key)
            if parent is None:
                click.echo(f"{'  ' * depth}{field}: {key[:12]} (not in the store any more)")
                continue
            click.echo(f"{'  ' * depth}{field}: {parent.manifest['stage']} ({parent.kind} {key[:12]})")
            _lineage(store, parent, depth + 1)
