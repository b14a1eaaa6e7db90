"""Fills templates."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from jinja2 import StrictUndefined, TemplateError
from jinja2 import Template as Compiled
from jinja2.sandbox import ImmutableSandboxedEnvironment
from luthier.api import Augmenter, Context, DataError, Row
from luthier_plugins.template.config import LettersSlot, RangeSlot, TemplateConfig

PATIENCE = 200
"""Draws in a row that bring nothing new, after which the templates count as exhausted."""


class Template(Augmenter[TemplateConfig]):
    """The augmenter ``template``."""

    def __init__(self, config: TemplateConfig, context: Context) -> None:
        super().__init__(config, context)
        self._environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        # Compiling a template takes a hundred times as long as rendering it.
        self._compiled: dict[str, Compiled] = {}

    def rows(self, rows: Sequence[Row]) -> Iterator[Row]:
        """Yield `count` different rows, drawn with the stage's seed.

        Raises:
            DataError: a template does not render, or there are fewer different rows than asked for.
        """
        draw = random.Random(self.context.seed)
        seen: set[str] = set()
        failures = 0
        while len(seen) < self.config.count:
            slots: dict[str, Any] = {}
            for name, slot in self.config.slots.items():
                slots[name] = self._render(self._value(slot, draw), slots)
            row = self._render(draw.choice(self.config.templates), slots)
            text = json.dumps(row, sort_keys=True)
            if text in seen:
                failures += 1
                if failures >= PATIENCE:
                    raise DataError(
                        f"templates and slots give only about {len(seen)} different rows, not {self.config.count}",
                        hint="lower `count`, or add templates or values",
                    )
                continue
            failures = 0
            seen.add(text)
            yield row

    @staticmethod
    def _value(slot: list[Any] | RangeSlot | LettersSlot, draw: random.Random) -> Any:
        if isinstance(slot, RangeSlot):
            return draw.randint(*slot.range)
        if isinstance(slot, LettersSlot):
            return "".join(draw.choices(slot.alphabet, k=draw.randint(*slot.letters)))
        return draw.choice(slot)

    def _render(self, value: Any, slots: Mapping[str, Any]) -> Any:
        if isinstance(value, str):
            return self._render_text(value, slots) if "{{" in value or "{%" in value else value
        if isinstance(value, Mapping):
            mapping = cast("Mapping[str, Any]", value)
            return {key: self._render(item, slots) for key, item in mapping.items()}
        if isinstance(value, list):
            return [self._render(item, slots) for item in cast("list[Any]", value)]
        return value

    def _render_text(self, text: str, slots: Mapping[str, Any]) -> str:
        try:
            if text not in self._compiled:
                self._compiled[text] = self._environment.from_string(text)
            return self._compiled[text].render(slots)
        except TemplateError as error:
            raise DataError(
                f"the template {text!r} does not render: {error}", hint=f"there are the slots {', '.join(slots)}"
            ) from error
