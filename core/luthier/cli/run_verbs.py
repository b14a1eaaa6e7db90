"""``luthier run`` and ``luthier plan``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from luthier.api.config import Estimate
from luthier.api.execution import Event
from luthier.cli.reading import planned
from luthier.cli.tools import offer_missing
from luthier.planning import Plan
from luthier.running.runner import run


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The arguments that every verb on a recipe takes."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="JSON for machines."),
        click.option("--store", type=click.Path(path_type=Path), help="The store; by default ./.luthier."),
        click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Replace one value."),
        click.argument("recipe", type=click.Path(path_type=Path)),
    ):
        command = option(command)
    return command


@click.command("plan", epilog="Example: luthier plan recipe.yaml --set stages.tuned.beta=0.2")
@recipe_options
def plan_command(recipe: Path, overrides: tuple[str, ...], store: Path | None, as_json: bool) -> None:
    """Show per stage whether it is cached, will run or will resume, and why. Runs nothing."""
    made = planned(recipe, store, overrides)
    if as_json:
        click.echo(json.dumps([_node_json(made, name) for name in made.nodes], indent=2))
        return
    width = max(len(name) for name in made.nodes)
    for node in made.nodes.values():
        about = _estimate(node.estimate)
        click.echo(f"{node.id:<{width}}  {node.status:<7} {node.produces:<8} {node.reason}{about}")


def _node_json(made: Plan, name: str) -> dict[str, Any]:
    node = made.nodes[name]
    return {
        "stage": name,
        "uses": node.component.name,
        "key": node.key,
        "produces": node.produces,
        "status": node.status,
        "reason": node.reason,
        "inputs": node.inputs,
    }


def _estimate(estimate: Estimate) -> str:
    parts = [f"{estimate.rows:,} rows"] if estimate.rows is not None else []
    parts += [f"{estimate.tokens:,} tokens"] if estimate.tokens is not None else []
    parts += [f"{estimate.disk / 1e6:,.1f} MB on disk"] if estimate.disk is not None else []
    parts += [f"{estimate.memory / 1e6:,.0f} MB of memory"] if estimate.memory is not None else []
    parts += (
        [f"{timedelta(seconds=round(estimate.seconds))} at the speed of last time"]
        if estimate.seconds is not None
        else []
    )
    return f" (about {', '.join(parts)})" if parts else ""


@click.command("run", epilog="Example: luthier run recipe.yaml --only tuned")
@recipe_options
@click.option("--only", multiple=True, metavar="STAGE", help="Make these stages and what they need.")
@click.option("--keep-going", is_flag=True, help="After a failure, run what does not depend on it.")
def run_command(
    recipe: Path, overrides: tuple[str, ...], store: Path | None, as_json: bool, only: tuple[str, ...], keep_going: bool
) -> None:
    """Run a recipe: cached stages are not run again, interrupted ones resume."""
    made = planned(recipe, store, overrides)
    if as_json:
        sys.exit(run(made, only=only, keep_going=keep_going, listeners=[_print_json]).exit_code)
    offer_missing(made, only)
    # rich is only paid for where something is shown.
    from luthier.cli.display import Display, make_console, summarize

    console = make_console()
    with Display(console) as display:
        result = run(made, only=only, keep_going=keep_going, listeners=[display])
    summarize(result, console)
    sys.exit(result.exit_code)


def _print_json(event: Event) -> None:
    click.echo(json.dumps(event, ensure_ascii=False, default=str))
