"""Writes `docs/reference/` from the installed components and verbs: ``python docs/generate.py``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
from luthier.api import KINDS
from luthier.api.config import configs_of
from luthier.api.descriptions import descriptions
from luthier.cli.main import VERBS, Verbs, luthier
from luthier.merging.api import Filtered, PerModel
from luthier.registry import default_registry
from pydantic import BaseModel

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
            rows = list(_rows(registry.config_class(component)))
            if rows:
                lines += ["| key | default | what it is |", "| --- | --- | --- |", *rows, ""]
    return "\n".join(lines)


def _rows(config: type[BaseModel], inside: str = "") -> Iterator[str]:
    """A line for each key, and for the keys of configs inside of it."""
    about_fields = descriptions(config)
    for key, field in config.model_fields.items():
        about = " ".join(about_fields.get(key, "").split())
        if words := _words(field.annotation):
            about = f"{about} One of {', '.join(f'`{word}`' for word in words)}.".strip()
        yield f"| `{inside}{key}` | {_default(field)} | {about} |"
        marks = {list: "[]", dict: ".<name>"}.get(get_origin(field.annotation), "")
        # A setting is written in the same ways everywhere: the how-to tells how.
        for nested in dict.fromkeys(
            inner for inner in configs_of(field.annotation) if inner not in (Filtered, PerModel)
        ):
            yield from _rows(nested, f"{inside}{key}{marks}.")


def _words(annotation: Any) -> list[str]:
    """The words that a field takes, where it takes nothing else."""
    kinds = [part for part in get_args(annotation) if part is not type(None)]
    if get_origin(annotation) is Literal:
        return [word for word in kinds if isinstance(word, str)]
    return _words(kinds[0]) if len(kinds) == 1 else []


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
