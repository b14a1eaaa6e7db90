"""``luthier verify-store``: read every artifact of a store again."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from luthier.artifacts.store import Store


@click.command("verify-store", epilog="Example: luthier verify-store --remove")
@click.option("--remove", is_flag=True, help="Remove damaged artifacts, so that the next run makes them again.")
@click.option("--store", type=click.Path(path_type=Path), help="The store; by default ./.luthier.")
def verify_store_command(remove: bool, store: Path | None) -> None:
    """Read every file of every artifact, and compare it with what was stored.

    Ends with 1 where one is damaged.
    """
    place = Store.at(store)
    damaged = 0
    keys = place.stored_keys()
    for key in keys:
        artifact = place.find(key)
        problem = place.broken(key) if artifact is None else place.damage(artifact, anew=True)
        if problem is None:
            continue
        damaged += 1
        stage = f" ({artifact.manifest['stage']})" if artifact is not None else ""
        click.echo(f"{key[:12]}{stage}: {problem}{'; removed' if remove else ''}")
        if remove:
            place.discard(key)
    click.echo(f"{len(keys)} artifacts, {damaged} damaged")
    sys.exit(bool(damaged and not remove))
