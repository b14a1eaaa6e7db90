"""Turns pydantic's errors into problems with a place and a did-you-mean."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, cast, get_args

from pydantic import BaseModel, ValidationError

from luthier.api.config import Components, SubComponent, marker
from luthier.api.errors import PluginError, Problem
from luthier.recipe.document import Document

Location = tuple[str | int, ...]


def near(word: str, known: Iterable[str]) -> str:
    """A hint: the nearest known word, or all of them."""
    names = sorted(known)
    found = difflib.get_close_matches(word, names, n=1)
    return f"did you mean '{found[0]}'?" if found else f"known here: {', '.join(names)}"


def from_validation(
    error: ValidationError,
    config_class: type[BaseModel],
    raw: Any,
    document: Document,
    prefix: Location,
    components: Components,
) -> list[Problem]:
    """Every error of a validation as a problem of the document."""
    problems: list[Problem] = []
    for item in error.errors(include_url=False):
        location = _in_document(item["loc"], document, prefix)
        message, hint = item["msg"], None
        if item["type"] == "extra_forbidden":
            message = f"unknown key '{item['loc'][-1]}'"
            owner = _class_at(config_class, raw, item["loc"][:-1], components)
            hint = near(str(item["loc"][-1]), owner.model_fields) if owner else None
        elif item["type"] == "missing":
            message = f"'{item['loc'][-1]}' is missing"
        elif item["type"] == "component":
            message, _, hint = message.partition("\n  ")
        elif item["type"] == "value_error":
            # What a config's own check says is already a sentence.
            message = message.removeprefix("Value error, ")
        elif isinstance(item["input"], (str, int, float, bool)):
            message = f"{message[0].lower()}{message[1:]}, not {item['input']!r}"
        problem = document.problem((*prefix, *location), message, hint or None)
        if problem not in problems:
            problems.append(problem)
    return problems


def _in_document(location: Location, document: Document, prefix: Location) -> Location:
    # pydantic adds the names of union members to locations; they are not in the file.
    kept: Location = ()
    for index, part in enumerate(location):
        last = index == len(location) - 1
        if last or (*prefix, *kept, part) in document.lines or not document.lines:
            kept = (*kept, part)
    return kept


def _class_at(config_class: type[BaseModel], raw: Any, location: Location, components: Components) -> Any:
    """The config class at a location, following sub-components through the registry."""
    current: type[BaseModel] | None = config_class
    sub: Any | None = None
    for part in location:
        if isinstance(raw, Mapping):
            raw = cast("Mapping[Any, Any]", raw).get(part)
        elif isinstance(raw, list) and isinstance(part, int):
            raw = cast("list[Any]", raw)[part]
        if isinstance(part, str):
            if current is None or part not in current.model_fields:
                return None
            sub = marker(current, part, SubComponent)
            current = None if sub else _model_in(current.model_fields[part].annotation)
        uses = _uses(raw)
        if sub is not None and isinstance(uses, str):
            try:
                current = components.config_class(components.get(sub.kind, uses))
            except PluginError:
                return None
    return current


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part)) is not None), None)


def _uses(raw: Any) -> Any:
    return cast("Mapping[Any, Any]", raw).get("uses") if isinstance(raw, Mapping) else raw
