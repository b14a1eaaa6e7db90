"""``luthier completion``: completion for shells."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command("completion", epilog='Example: eval "$(luthier completion bash)"')
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> None:
    """Print the script that makes a shell complete verbs and options."""
    from luthier.cli.main import luthier

    found = get_completion_class(shell)
    assert found is not None, "click knows these three"
    click.echo(found(luthier, {}, "luthier", "_LUTHIER_COMPLETE").source())
