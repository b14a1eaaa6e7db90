"""``luthier plugin new`` and ``luthier plugin check``."""

from __future__ import annotations

import re
import sys
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import click

from luthier.api.kinds import KINDS
from luthier.registry import default_registry

NAME = re.compile(r"[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*")
SCAFFOLD = files("luthier.cli") / "scaffold"


@click.group("plugin", epilog="Example: luthier plugin new median --kind merge_method")
def plugin_command() -> None:
    """Write a plugin, or check an installed one."""


@plugin_command.command("new", epilog="Example: luthier plugin new median --kind merge_method")
@click.argument("name")
@click.option("--kind", required=True, type=click.Choice(sorted(KINDS)), help="What it provides.")
@click.option("--out", type=click.Path(path_type=Path), help="The folder; by default luthier-plugin-NAME.")
def new_command(name: str, kind: str, out: Path | None) -> None:
    """Write a package that installs and whose tests pass as written."""
    if not NAME.fullmatch(name):
        raise click.BadParameter("a name has lower-case letters, digits, '-'; a letter first", param_hint="NAME")
    distribution = f"luthier-plugin-{name.replace('_', '-')}"
    folder = out or Path(distribution)
    if folder.exists():
        raise click.BadParameter(f"'{folder}' exists already", param_hint="--out")
    for path, text in scaffold(name, kind, distribution).items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        click.echo(str(target))
    click.echo(f"next: pip install -e '{folder}[test]'\n      luthier plugin check {name}\n      pytest {folder}")


def scaffold(name: str, kind: str, distribution: str) -> dict[str, str]:
    """The files of a new plugin by path."""
    import yaml

    module = distribution.replace("-", "_")
    about: dict[str, str] = yaml.safe_load((SCAFFOLD / kind / "meta.yaml").read_text(encoding="utf-8"))
    values = {
        "name": name,
        "kind": kind,
        "distribution": distribution,
        "module": module,
        "Class": "".join(part.title() for part in re.split("[-_]", name)),
        "summary": about["summary"],
        "usage": about["usage"].replace("NAME", name).rstrip(),
    }
    package = f"src/{module}"
    sources = {
        "pyproject.toml": SCAFFOLD / "common" / "pyproject.toml.j2",
        "README.md": SCAFFOLD / "common" / "README.md.j2",
        f"{package}/__init__.py": SCAFFOLD / "common" / "init.py.j2",
        f"{package}/config.py": SCAFFOLD / kind / "config.py.j2",
        f"{package}/{kind}.py": SCAFFOLD / kind / "impl.py.j2",
        f"tests/test_{module.removeprefix('luthier_plugin_')}.py": SCAFFOLD / kind / "test.py.j2",
    }
    return {path: _rendered(source, values) for path, source in sources.items()}


def _rendered(source: Traversable, values: dict[str, Any]) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    return environment.from_string(source.read_text(encoding="utf-8")).render(values)


@plugin_command.command("check", epilog="Example: luthier plugin check median")
@click.argument("name")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A config value without a default.")
def check_command(name: str, overrides: tuple[str, ...]) -> None:
    """Check every component of that name, or of the distribution of that name.

    Ends with exit code 1 when a check fails.
    """
    # The checks load torch where a kind's behaviour needs it: the one verb that may.
    from luthier.recipe.document import parse_scalar
    from luthier.testing import findings_of

    registry = default_registry()
    chosen = [component for component, provider in registry if name in (component.name, provider.distribution)]
    broken = [item for item in registry.broken if name in (item.provider.distribution, item.provider.plugin)]
    for item in broken:
        click.echo(f"broken: {item.provider}: {item.error}\n{item.details}", err=True)
    if not chosen and not broken:
        raise click.BadParameter(f"no component or distribution is called '{name}'; see `luthier plugins`")
    values = {key: parse_scalar(value) for key, _, value in (text.partition("=") for text in overrides)}
    failed = bool(broken)
    for component in chosen:
        click.echo(f"{component.kind} {component.name}")
        for finding in findings_of(component, values, registry=registry):
            failed = failed or finding.problem is not None
            click.echo(f"  {'ok    ' if finding.problem is None else 'FAILED'}  {finding.check}")
            if finding.problem is not None:
                click.echo(f"          {finding.problem}")
    sys.exit(1 if failed else 0)
