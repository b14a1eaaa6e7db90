"""Fills templates."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from luthier.api import DataError, Row
from luthier_plugins.template.config import LettersSlot, RangeSlot, TemplateConfig

PATIENCE = 200
"""Draws in a row that bring nothing new, after which the templates count as exhausted."""


class Template:
    """The augmenter ``template``."""

    def __init__(self, config: TemplateConfig) -> None:
        self.config = config
        self._environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)

    def rows(self, rows: Sequence[Row], seed: int) -> Iterator[Row]:
        """Yield `count` different rows, drawn with `seed`.

        Raises:
            DataError: a template does not render, or there are fewer different rows than asked for.
        """
        draw = random.Random(seed)
        seen: set[str] = set()
        failures = 0
        while len(seen) < self.config.count:
            slots = {name: self._value(slot, draw) for name, slot in self.config.slots.items()}
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
            try:
                return self._environment.from_string(value).render(slots)
            except TemplateError as error:
                raise DataError(f"the template {value!r} does not render: {error}",
                                hint=f"there are the slots {', '.join(slots)}") from error  # fmt: skip
        if isinstance(value, Mapping):
            mapping = cast("Mapping[str, Any]", value)
            return {key: self._render(item, slots) for key, item in mapping.items()}
        if isinstance(value, list):
            return [self._render(item, slots) for item in cast("list[Any]", value)]
        return value
