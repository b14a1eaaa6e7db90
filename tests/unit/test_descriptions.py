"""The texts below the fields of configs."""

from __future__ import annotations

from typing import Any

from luthier.api import Config, Field
from luthier.api.descriptions import Described, descriptions
from pydantic import create_model


class Outer(Config):
    """A config."""

    steps: int = 1
    """How many steps;
    at least one."""
    rate: float = Field(default=0.1, description="Its own.")
    """Not this."""
    silent: bool = False

    def method(self) -> None:
        """Of no field."""


class Inner(Outer):
    """One that inherits."""

    silent: bool = True
    """Said here."""


class Holder(Config):
    """One with another inside."""

    inner: Inner
    """The inner one."""


def test_a_field_is_what_stands_below_it_unless_it_says_so_itself() -> None:
    assert descriptions(Outer) == {"steps": "How many steps;\nat least one.", "rate": "Its own."}


def test_texts_are_inherited_field_by_field() -> None:
    assert descriptions(Inner) == {**descriptions(Outer), "silent": "Said here."}


def test_a_class_without_source_has_the_texts_of_those_it_inherits_from() -> None:
    made: Any = create_model("Made", __base__=Outer, more=(int, 3))
    assert descriptions(made) == descriptions(Outer)


def test_schemas_show_them_in_nested_configs_too() -> None:
    schema = Holder.model_json_schema(schema_generator=Described)
    assert schema["properties"]["inner"]["description"] == "The inner one."
    assert schema["$defs"]["Inner"]["properties"]["silent"]["description"] == "Said here."
