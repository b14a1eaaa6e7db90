"""``luthier plugins`` and ``luthier schema``."""

from __future__ import annotations

import json
from typing import Any

import click

from luthier.api.kinds import KINDS
from luthier.registry import default_registry


@click.command("plugins", epilog="Example: luthier plugins --kind merge_method")
@click.option("--kind", type=click.Choice(sorted(KINDS)), help="Only components of this kind.")
@click.option("--json", "as_json", is_flag=True, help="JSON for machines.")
def plugins_command(kind: str | None, as_json: bool) -> None:
    """List the installed components with their providers, and the plugins that could not be loaded."""
    registry = default_registry()
    rows = sorted(
        (component.kind, component.name, component.summary, str(provider))
        for component, provider in registry
        if kind in (None, component.kind)
    )
    broken = [(str(plugin.provider), plugin.error) for plugin in registry.broken]
    pairs = [row[:2] for row in rows]
    broken += [
        (row[3], f"the {row[0]} '{row[1]}' has more than one provider: uninstall all but one")
        for row in rows
        if pairs.count(row[:2]) > 1
    ]
    if as_json:
        keys = ("kind", "name", "summary", "provider")
        components = [dict(zip(keys, row, strict=True)) for row in rows]
        click.echo(json.dumps({"components": components, "broken": dict(broken)}, indent=2))
        return
    widths = [max((len(row[index]) for row in rows), default=0) for index in range(3)]
    for row in rows:
        click.echo("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]]))
    for provider, error in broken:
        click.echo(f"broken: {provider}: {error}", err=True)


@click.command("schema", epilog="Example: luthier schema > luthier.schema.json")
def schema_command() -> None:
    """Print the JSON Schema of recipes with every installed component, for editors."""
    from luthier.recipe.schema import recipe_schema

    schema: dict[str, Any] = recipe_schema(default_registry())
    click.echo(json.dumps(schema, indent=2))
