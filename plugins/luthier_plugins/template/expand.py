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
from luthier.api.data import ID, PARENTS
from luthier.artifacts.rows import id_of, prompt_of, reference_of
from luthier.data.files import data_files
from luthier.data.raw import raw_rows
from luthier_plugins.template.config import ColumnSlot, FileSlot, LettersSlot, RangeSlot, TemplateConfig

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
        drawn = {name: self._choices(slot) for name, slot in self.config.slots.items()}
        from_rows = any(isinstance(slot, ColumnSlot) for slot in self.config.slots.values())
        if from_rows and not rows:
            raise DataError("a slot is filled from a column, and there are no rows", hint="give the stage `data`")
        while len(seen) < self.config.count:
            parent = draw.choice(rows) if from_rows else {}
            slots: dict[str, Any] = {}
            for name, slot in self.config.slots.items():
                if isinstance(slot, ColumnSlot):
                    slots[name] = _under(slot.column, parent)
                elif isinstance(slot, FileSlot):
                    # As it is: braces in a file are no template of the recipe's.
                    slots[name] = self._value(drawn[name], draw)
                else:
                    slots[name] = self._render(self._value(drawn[name], draw), slots)
            row = self._render(draw.choice(self.config.templates), slots)
            if from_rows:
                row[PARENTS] = [str(parent.get(ID) or id_of(parent))]
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

    def _choices(self, slot: Any) -> Any:
        """What is drawn from for a slot: of a file its lines, or its rows."""
        if not isinstance(slot, FileSlot):
            return slot
        path = self.context.path(slot.file)
        if path.suffix == ".txt":
            found: list[Any] = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        else:
            found = [raw for file in data_files(path)[0] for _, raw in raw_rows(file)]
        bad = next((raw for raw in found if isinstance(raw, DataError)), None)
        if bad is not None or not found:
            raise bad or DataError("a slot is filled from a file that holds nothing", where=str(path))
        return found

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


def _under(column: str, row: Row) -> Any:
    """What a row has under a key; the text of its prompt or its answer."""
    if column in row and column != "prompt":
        return row[column]
    prompt = prompt_of(row)
    texts = {"prompt": prompt[-1]["content"] if prompt else None, "answer": reference_of(row)}
    found = texts.get(column)
    if found is None:
        raise DataError(f"a row has nothing under '{column}'", hint=f"it has {', '.join(sorted(row))}; see `keep`")
    return found
