"""Tools with an environment of their own: made when the user agrees."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import click

from luthier.planning import Plan
from luthier.serving.environments import Environment


def install(environment: Environment, yes: bool = False) -> None:
    """Make the environment of a tool, when the user agrees.

    Args:
        yes: Do not ask.
    """
    if environment.ready:
        click.echo(f"{environment.name} is installed: {environment.folder}")
        return
    click.echo(
        f"{environment.name}: {environment.about}\ninto {environment.folder}: "
        f"{', '.join(environment.packages)} and what these need, some GB"
    )
    if yes or click.confirm("install?"):
        environment.install(click.echo)
        click.echo("installed")


def offer_missing(plan: Plan, only: Iterable[str] = ()) -> None:
    """Offer to make the environments that a run needs; a run without a terminal says what to do instead."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        for environment in plan.missing_tools(only):
            install(environment)
