"""The entry point: verbs are imported when they are used."""

from __future__ import annotations

import sys
import traceback
from importlib import import_module

import click

VERBS = {
    "chat": ("luthier.cli.chat:chat_command", "Chat with a model, an adapter or an export."),
    "clean": ("luthier.cli.clean:clean_command", "Remove what no recipe needs any more."),
    "compare": ("luthier.cli.compare:compare_command", "Have people judge two models' answers, blind."),
    "completion": ("luthier.cli.completion:completion_command", "Print completion for a shell."),
    "data": ("luthier.cli.data:data_command", "Look at datasets: what rows are like, and what is odd."),
    "diff": ("luthier.cli.diff:diff_command", "Show how models differ, layer by layer."),
    "do": ("luthier.cli.do:do_command", "Run one stage without a recipe."),
    "doctor": ("luthier.cli.doctor:doctor_command", "Show versions, devices and what is missing."),
    "init": ("luthier.cli.init:init_command", "Write a starter recipe for a data file."),
    "plan": ("luthier.cli.run_verbs:plan_command", "Show what a run would do, and why."),
    "plugin": ("luthier.cli.plugin_author:plugin_command", "Write a plugin, or check one."),
    "plugins": ("luthier.cli.plugin_verbs:plugins_command", "List the installed components."),
    "preview": ("luthier.cli.preview:preview_command", "Show what a stage would train on."),
    "report": ("luthier.cli.report:report_command", "Write a page about a run, or about two."),
    "run": ("luthier.cli.run_verbs:run_command", "Run a recipe."),
    "runs": ("luthier.cli.report:runs_command", "List runs, and what they measured."),
    "schema": ("luthier.cli.plugin_verbs:schema_command", "Print the JSON Schema of recipes."),
    "show": ("luthier.cli.show:show_command", "Show a run, a stage, an artifact, or what there is."),
    "serve": ("luthier.cli.serve:serve_command", "Serve a model or an export on this machine, for trying out."),
    "verify-store": ("luthier.cli.verify_store:verify_store_command", "Read every artifact again, and compare."),
    "verify": ("luthier.cli.verify:verify_command", "Compare a running server with a golden file."),
}


class Verbs(click.Group):
    """Lists the verbs without importing them, and those of plugins after them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*sorted(VERBS), *sorted(_plugin_commands())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in VERBS:
            module, _, name = VERBS[cmd_name][0].partition(":")
            return getattr(import_module(module), name)
        return _plugin_commands().get(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, about) for name, (_, about) in sorted(VERBS.items())])
        foreign = _plugin_commands()
        if foreign:
            with formatter.section("Verbs of plugins"):
                formatter.write_dl([(name, foreign[name].get_short_help_str()) for name in sorted(foreign)])


def _plugin_commands() -> dict[str, click.Command]:
    """The verbs that plugins provide; a plugin cannot replace one of Luthier's own."""
    from luthier.registry import default_registry

    commands: dict[str, click.Command] = {}
    for command in default_registry().commands():
        if command.name and command.name not in VERBS:
            commands[command.name] = command
    return commands


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="luthier")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def luthier(debug: bool) -> None:
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
        click.echo("interrupted", err=True)
        sys.exit(130)
    except LuthierError as error:
        # Click has left its context by now, so the flag is read where it was given.
        if "--debug" in sys.argv:
            traceback.print_exc()
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        place = f"{error.filename}: " if error.filename else ""
        click.echo(f"error: {place}{error.strerror or error}", err=True)
        sys.exit(1)
