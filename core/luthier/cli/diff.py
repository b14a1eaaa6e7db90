"""``luthier diff``: how models differ, before they are merged."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from luthier.artifacts.store import Store

EXAMPLE = "Example: luthier diff soup/full soup/light --base soup/ancestor --html differences.html"


@click.command("diff", epilog=EXAMPLE)
@click.argument("models", nargs=-1, required=True)
@click.option("--base", help="Their ancestor: then the task vectors are compared.")
@click.option("--html", type=click.Path(path_type=Path), help="Copy the page with all parameters to this file.")
@click.option("--store", type=click.Path(path_type=Path), help="The store; by default ./.luthier.")
def diff_command(models: tuple[str, ...], base: str | None, html: Path | None, store: Path | None) -> None:
    """Compare two or more models or adapters: cosine, share of equal signs and relative norm, layer by layer.

    MODELS are RECIPE/STAGE, keys or the beginnings of some, folders, or hub ids.
    """
    from luthier.cli.display import make_console, summarize
    from luthier.cli.do import place_of, run_alone

    if len(models) < 2:
        raise click.BadParameter("name at least two models", param_hint="MODELS")
    place = Store.at(store)
    config: dict[str, Any] = {"uses": "diff", "models": [place_of(text, place) for text in models]}
    if base is not None:
        config["base"] = place_of(base, place)
    result = run_alone("diff", config, 0, place)
    summarize(result, make_console())
    if result.exit_code:
        sys.exit(result.exit_code)
    made = result.artifact("diff").path / result.artifact("diff").facts["page"]
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_bytes(made.read_bytes())
    click.echo(f"\nall parameters: {html or made}")
