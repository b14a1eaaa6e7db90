"""The config of the augmenter ``template``."""

from __future__ import annotations

from typing import Any

from luthier.api import Config, Field, FileSource
from pydantic import model_validator


class RangeSlot(Config):
    """A whole number."""

    range: tuple[int, int]
    """The smallest and the largest number."""

    @model_validator(mode="after")
    def _in_order(self) -> RangeSlot:
        if self.range[0] > self.range[1]:
            raise ValueError(f"the range [{self.range[0]}, {self.range[1]}] is empty: the smallest number comes first")
        return self


class LettersSlot(Config):
    """A made-up word."""

    letters: tuple[int, int]
    """The smallest and the largest number of letters."""
    alphabet: str = "abcdefghijklmnopqrstuvwxyz"
    """The letters to draw from."""


class FileSlot(Config):
    """A line of a text file, or a row of a data file, used as ``{{ city.name }}``."""

    file: FileSource
    """The file: ``.txt``, in which empty lines do not count, or one that the stage `data` reads."""


class ColumnSlot(Config):
    """What a row of the stage's `data` has under a key; all such slots of a new row are of the same row, which is its
    parent."""

    column: str
    """The key, such as that of a column which the data keeps; ``prompt`` and ``answer`` are the texts of a row."""


class TemplateConfig(Config):
    """Draws a value for each slot, then renders one of the templates with them, in Jinja's sandbox."""

    templates: list[dict[str, Any]] = Field(min_length=1)
    """Rows whose texts are Jinja templates, such as ``{messages: [{role: user, content: "{{ verb }} it"}]}``."""
    slots: dict[str, list[Any] | RangeSlot | LettersSlot | FileSlot | ColumnSlot] = {}
    """What each slot is filled from, in this order. An entry of a list may be a mapping, used as
    `{{ city.name }}`, and may itself use the slots above it: `["near {{ city.name }}", "far away"]`."""
    count: int = Field(gt=0)
    """How many different rows to make."""

    @model_validator(mode="after")
    def _no_empty_slots(self) -> TemplateConfig:
        for name, slot in self.slots.items():
            if isinstance(slot, list) and not slot:
                raise ValueError(f"the slot '{name}' has no values")
        return self
