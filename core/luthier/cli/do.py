"""``luthier do``: one stage without a recipe."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, cast, get_origin

import click
from pydantic import BaseModel

from luthier.api.artifact import BASE
from luthier.api.component import Kind
from luthier.api.config import Config, Input, Source, SubComponent, configs_of, marker
from luthier.artifacts.store import Store
from luthier.cli.reading import planned
from luthier.cli.tools import offer_missing
from luthier.recipe import Recipe
from luthier.recipe.document import parse_scalar
from luthier.registry import Registry, default_registry
from luthier.running.runner import RunResult, run

EXAMPLE = "Example: luthier do merge models=a,b method.uses=slerp method.t=0.4 --out merged/"


@click.command("do", epilog=EXAMPLE)
@click.argument("stage")
@click.argument("values", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--out", type=click.Path(path_type=Path), help="Copy the result to this new folder.")
@click.option("--seed", default=0, show_default=True, help="The seed.")
@click.option("--store", type=click.Path(path_type=Path), help="The store; by default ./.luthier.")
def do_command(stage: str, values: tuple[str, ...], out: Path | None, seed: int, store: Path | None) -> None:
    """Run one stage: the same keys as in a recipe, dots for what is inside, commas for lists.

    Inputs are folders, hub ids, or artifacts of the store (RECIPE/STAGE, or the beginning of a key).
    """
    from luthier.cli.display import make_console, summarize

    if out is not None and out.exists():
        raise click.BadParameter(f"'{out}' exists already", param_hint="--out")
    place = Store.at(store)
    console = make_console()
    result = run_alone(stage, _config(stage, values, place), seed, place)
    summarize(result, console)
    if out is not None and result.exit_code in (0, 3):
        made = result.artifact(stage)
        shutil.copytree(made.path, out)
        if made.kind == "adapter":
            # Outside its store, an adapter brings the model it sits on.
            shutil.copytree(made.base.path, out / BASE)
        console.print(f"\ncopied to {out}")
    sys.exit(result.exit_code)


def run_alone(stage: str, config: dict[str, Any], seed: int, store: Store) -> RunResult:
    """Run one stage, and show its progress."""
    from luthier.cli.display import Display, make_console

    recipe = Recipe.from_mapping({"luthier": 1, "name": "do", "seed": seed, "stages": {stage: config}})
    made = planned(recipe, store)
    offer_missing(made)
    with Display(make_console()) as display:
        return run(made, listeners=[display])


def _config(stage: str, values: tuple[str, ...], store: Store) -> dict[str, Any]:
    registry = default_registry()
    config_class = registry.config_class(registry.get("stage", stage))
    config: dict[str, Any] = {"uses": stage}
    for text in values:
        path, equals, value = text.partition("=")
        if not equals:
            raise click.BadParameter(f"'{text}' has no '='; write KEY=VALUE")
        *parents, last = path.split(".")
        inside: dict[str, Any] = config
        for part in parents:
            inner: Any = inside.get(part, {})
            # `method=slerp` and `method.t=0.4`, in either order.
            inner = {"uses": inner} if isinstance(inner, str) else inner
            inside[part] = inner
            inside = inner
        found = _value(config_class, path, value)
        if isinstance(inside.get(last), dict) and isinstance(found, str):
            inside[last]["uses"] = found
        else:
            inside[last] = found
    return {**_placed(config_class, config, store, registry), "uses": stage}


def _placed(config_class: type[BaseModel], values: dict[str, Any], store: Store, registry: Registry) -> dict[str, Any]:
    """Values in which every artifact is named as a recipe would, also in sub-components and lists inside."""

    def inside(value: Any, kind: type[BaseModel]) -> Any:
        return _placed(kind, cast("dict[str, Any]", value), store, registry) if isinstance(value, dict) else value

    result = dict(values)
    for name in config_class.model_fields.keys() & values.keys():
        value, used = values[name], marker(config_class, name, SubComponent)
        named, read = marker(config_class, name, Input), marker(config_class, name, Source)
        kinds = configs_of(config_class.model_fields[name].annotation)
        if named is not None:
            result[name] = _each(value, lambda item, words=named.words: _named(item, words, store))
        elif read is not None:
            result[name] = _each(value, _absolute)
        elif used is not None:
            result[name] = _each(value, lambda item, kind=used.kind: inside(item, _of_component(item, kind, registry)))
        elif len(kinds) == 1:
            result[name] = _each(value, lambda item, kind=kinds[0]: inside(item, kind))
        if get_origin(config_class.model_fields[name].annotation) is list and not isinstance(value, (list, NoneType)):
            # One value alone for a key that holds a list, wherever the key stands.
            result[name] = [result[name]]
    return result


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """A value changed, or every item of a list."""
    return [change(item) for item in cast("list[Any]", value)] if isinstance(value, list) else change(value)


def _named(item: Any, words: Sequence[str], store: Store) -> Any:
    return item if item is None or item in words else place_of(str(item), store)


def _absolute(item: Any) -> Any:
    return str(Path(str(item)).absolute()) if Path(str(item)).exists() else item


def _of_component(value: Any, kind: Kind, registry: Registry) -> type[BaseModel]:
    """The config of a sub-component; an empty one where there is no such component, which is reported later."""
    name = str(cast("dict[str, Any]", value).get("uses")) if isinstance(value, dict) else ""
    return registry.config_class(registry.get(kind, name)) if name in registry.names(kind) else Config


def _value(config_class: Any, path: str, text: str) -> Any:
    """A value as a recipe would hold it: YAML, or a list without its brackets where a list is expected."""
    field = config_class.model_fields.get(path)
    whole = parse_scalar(text)
    if field is None:
        # Inside a sub-component, whose fields are not known yet.
        return [parse_scalar(part) for part in text.split(",")] if isinstance(whole, str) and "," in text else whole
    many = "list" in str(field.annotation)
    items: list[Any] = [whole]
    if isinstance(whole, list):
        items, many = cast("list[Any]", whole), True
    elif many and not isinstance(whole, dict):
        items = [parse_scalar(part) for part in text.split(",")]
    return items if many else items[0]


def place_of(text: str, store: Store) -> str:
    """An input as a recipe would name it: a path or hub id unchanged, an artifact of the store by its folder.

    ``<model>+<adapter>`` is an adapter from outside on a model.
    """
    model, plus, adapter = text.rpartition("+")
    if plus and not Path(text).exists():
        there = Path(adapter).exists()
        return f"{place_of(model, store)}+{Path(adapter).absolute() if there else adapter}"
    if Path(text).exists() or ":" in text:
        return text if ":" in text else str(Path(text).absolute())
    return str(store.resolve(text).path)
