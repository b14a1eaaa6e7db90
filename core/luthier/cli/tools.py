"""Tools with their own environment: made when the user agrees."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import click

from luthier.api.serving import ToolEnvironment
from luthier.planning import Plan
from luthier.serving import environments


def install(tool: ToolEnvironment, yes: bool = False) -> None:
    """Make the environment of a tool, when the user agrees.

    Args:
        yes: Do not ask.
    """
    if environments.is_ready(tool):
        click.echo(f"{tool.name} is installed: {environments.folder_of(tool)}")
        return
    click.echo(
        f"{tool.name}: {tool.summary}\ninto {environments.folder_of(tool)}: "
        f"{', '.join(tool.packages)} and their dependencies, several GB"
    )
    if yes or click.confirm("install?"):
        environments.install(tool, click.echo)
        click.echo("installed")


def offer_missing(plan: Plan, only: Iterable[str] = ()) -> None:
    """Offer to make the environments that a run needs; a run without a terminal says what to do instead."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        for tool in plan.missing_tools(only):
            install(tool)
