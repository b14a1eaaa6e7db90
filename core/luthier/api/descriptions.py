"""What the fields of configs are: the text below each, read when somebody asks for it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from itertools import pairwise
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema


def descriptions(config: type[BaseModel]) -> dict[str, str]:
    """The description of each field that has one: its own, else the text below it in the class or one it inherits from.

    pydantic can read these texts itself, whenever a class is made: a fifth of the time in which a command starts.
    """
    found: dict[str, str] = {}
    for base in reversed(config.__mro__):
        if issubclass(base, BaseModel) and base is not BaseModel:
            found |= _texts(base)
    own = {name: field.description for name, field in config.model_fields.items()}
    return {name: text for name in own if (text := own[name] or found.get(name))}


class Described(GenerateJsonSchema):
    """Makes JSON Schemas with the descriptions of all fields."""

    def model_schema(self, schema: core_schema.ModelSchema) -> dict[str, Any]:
        made = super().model_schema(schema)
        for name, text in descriptions(schema["cls"]).items():
            made.get("properties", {}).get(name, {}).setdefault("description", text)
        return made


@cache
def _texts(config: type[BaseModel]) -> dict[str, str]:
    """The texts below the fields of one class."""
    try:
        source = textwrap.dedent(inspect.getsource(config))
    # A class that a program has made has no source.
    except (OSError, TypeError):
        return {}
    (made,) = ast.parse(source).body
    assert isinstance(made, ast.ClassDef)
    return {
        field.target.id: inspect.cleandoc(below.value.value)
        for field, below in pairwise(made.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }
