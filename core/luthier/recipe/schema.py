"""The JSON Schema of recipes, with every installed component, for editors."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, cast

from luthier.api.component import Kind
from luthier.api.descriptions import Described
from luthier.api.errors import PluginError
from luthier.api.kinds import KINDS
from luthier.registry import Registry


def recipe_schema(registry: Registry) -> dict[str, Any]:
    """A JSON Schema (draft 2020-12) that accepts what `Recipe` accepts, but for inputs that do not exist."""
    definitions: dict[str, Any] = {}
    for kind in KINDS:
        options: list[dict[str, Any]] = []
        names: list[str] = []
        for name in registry.names(kind):
            # One plugin's fault must not take the others out of the schema; recipes that need it are refused anyway.
            with suppress(PluginError):
                options.append(_component(registry, kind, name, definitions))
                names.append(name)
        plain: list[dict[str, Any]] = [{"enum": names}] if kind != "stage" and names else []
        # A kind without components: an empty `oneOf` is not a valid schema, `not: {}` accepts nothing.
        definitions[f"kind-{kind}"] = {"oneOf": [*plain, *options]} if options else {"not": {}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Luthier recipe",
        "type": "object",
        "required": ["luthier", "stages"],
        "additionalProperties": False,
        "properties": {
            "luthier": {"const": 1, "description": "The recipe format."},
            "name": {"type": "string", "description": "What runs of this recipe are called."},
            "seed": {"type": "integer", "minimum": 0, "description": "The seed of every stage."},
            "date": {"type": "string", "format": "date", "description": "The day that chat templates are told."},
            "requires": {"type": "array", "items": {"type": "string"}, "description": "Plugins this recipe needs."},
            "trackers": {"type": "array", "items": {"$ref": "#/$defs/kind-tracker"}},
            "executor": {"$ref": "#/$defs/kind-executor"},
            "stages": {
                "type": "object",
                "minProperties": 1,
                "additionalProperties": {"$ref": "#/$defs/kind-stage"},
            },
        },
        "$defs": definitions,
    }


def _component(registry: Registry, kind: Kind, name: str, definitions: dict[str, Any]) -> dict[str, Any]:
    component = registry.get(kind, name)
    reference = f"#/$defs/{kind}-{name}-"
    schema = registry.config_class(component).model_json_schema(
        ref_template=reference + "{model}", schema_generator=Described
    )
    for inner, value in schema.pop("$defs", {}).items():
        definitions[f"{kind}-{name}-{inner}"] = _linked(value)
    schema = _linked(schema)
    schema["properties"] = {"uses": {"const": name, "description": component.summary}, **schema.get("properties", {})}
    schema["required"] = ["uses", *schema.get("required", [])]
    definitions[f"{kind}-{name}"] = schema
    return {"$ref": f"#/$defs/{kind}-{name}"}


def _linked(value: Any) -> Any:
    """Replace the marks of sub-components by references to all components of that kind."""
    if isinstance(value, dict):
        mapping = cast("dict[str, Any]", value)
        kind = mapping.get("x-luthier-kind")
        if isinstance(kind, str):
            kept = {key: item for key, item in mapping.items() if key not in ("x-luthier-kind", "default")}
            return {**kept, "$ref": f"#/$defs/kind-{kind}"}
        return {key: _linked(item) for key, item in mapping.items()}
    if isinstance(value, list):
        return [_linked(item) for item in cast("list[Any]", value)]
    return value
