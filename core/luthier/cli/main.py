"""The entry point: verbs are imported when they are used."""

from __future__ import annotations

import sys
from importlib import import_module

import click

VERBS = {
    "plan": ("luthier.cli.run_verbs:plan_command", "Show what a run would do, and why."),
    "plugins": ("luthier.cli.plugin_verbs:plugins_command", "List the installed components."),
    "run": ("luthier.cli.run_verbs:run_command", "Run a recipe."),
    "schema": ("luthier.cli.plugin_verbs:schema_command", "Print the JSON Schema of recipes."),
    "show": ("luthier.cli.show:show_command", "Show an artifact or what is in the store."),
}


class Verbs(click.Group):
    """Lists the verbs without importing them; plugins' verbs are looked up when nothing else fits."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in VERBS:
            module, _, name = VERBS[cmd_name][0].partition(":")
            return getattr(import_module(module), name)
        from luthier.registry import default_registry

        commands = [command for found in default_registry().manager.hook.luthier_commands() for command in found]
        return next((command for command in commands if command.name == cmd_name), None)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, VERBS[name][1]) for name in self.list_commands(ctx)])


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="luthier")
def luthier() -> None:
    """From raw data to a tuned, merged, quantized model that is proven to work.

    \b
    Example:
      luthier run recipe.yaml
    """


def main() -> None:
    """Run the command line; errors meant for users end it with their exit code, without a traceback."""
    from luthier.api.errors import LuthierError

    try:
        luthier(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except LuthierError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(1)
