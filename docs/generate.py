"""Writes `docs/reference/` from the installed components and verbs: ``python docs/generate.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from luthier.api import KINDS
from luthier.cli.main import VERBS, Verbs, luthier
from luthier.registry import default_registry

HERE = Path(__file__).parent / "reference"


def components() -> str:
    """Every built-in component with its config."""
    registry = default_registry()
    lines = ["# Components", "", "Made by `docs/generate.py`. In a recipe, a component is chosen with `uses:`.", ""]
    for kind in KINDS:
        names = [
            name
            for name in registry.names(kind)
            if registry.provider(registry.get(kind, name)).distribution == "luthier"
        ]
        lines += [f"## {kind}", ""] + ([] if names else ["None is built in.", ""])
        for name in names:
            component = registry.get(kind, name)
            lines += [f"### {name}", "", f"{component.summary}.", ""]
            fields = registry.config_class(component).model_fields
            if fields:
                lines += ["| key | default | what it is |", "| --- | --- | --- |"]
                lines += [f"| `{key}` | {_default(field)} | {' '.join((field.description or '').split())} |"
                          for key, field in fields.items()]  # fmt: skip
                lines.append("")
    return "\n".join(lines)


def _default(field: Any) -> str:
    return "required" if field.is_required() else f"`{field.get_default(call_default_factory=True)!r}`"


def commands() -> str:
    """The help of every verb."""
    lines = ["# Commands", "", "Made by `docs/generate.py`.", ""]
    context = click.Context(luthier, info_name="luthier")
    assert isinstance(luthier, Verbs)
    for name in VERBS:
        command = luthier.get_command(context, name)
        assert command is not None
        inner = click.Context(command, info_name=name, parent=context, terminal_width=100)
        lines += [f"## luthier {name}", "", "```text", command.get_help(inner), "```", ""]
        if isinstance(command, click.Group):
            for sub in command.list_commands(inner):
                found = command.get_command(inner, sub)
                assert found is not None
                deeper = click.Context(found, info_name=sub, parent=inner, terminal_width=100)
                lines += [f"### luthier {name} {sub}", "", "```text", found.get_help(deeper), "```", ""]
    return "\n".join(lines)


PAGES = {"components.md": components, "commands.md": commands}

if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for page, make in PAGES.items():
        (HERE / page).write_text(make(), encoding="utf-8")
