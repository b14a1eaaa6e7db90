"""The augmenter ``synthesize``."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from luthier.api import DataError, Message, Row, Schema
from luthier.api.data import PARENTS
from luthier.artifacts.rows import COLUMNS, checked, compared_text, schema_of
from luthier.data.shingles import shingles_of
from luthier.serving.judging import told
from luthier_plugins.augmenters.asking import Asking, parent
from luthier_plugins.augmenters.config import SynthesizeConfig

BARREN = 3
"""Rounds in a row that bring nothing new, after which no more are asked for."""
_FENCE = re.compile(r"^```\w*\s*|\s*```$")
_TEXT = {"type": "string"}
_TURN = {
    "type": "object",
    "properties": {"role": {"type": "string", "enum": ["system", "user", "assistant"]}, "content": _TEXT},
    "required": ["role", "content"],
    "additionalProperties": False,
}
_TURNS = {"type": "array", "items": _TURN}
_COLUMNS: dict[str, Any] = {"text": _TEXT, "messages": _TURNS, "prompt": _TURNS, "label": {"type": "boolean"}}


class Synthesize(Asking[SynthesizeConfig]):
    """The augmenter ``synthesize``."""

    def made(self, rows: Sequence[Row]) -> Iterator[Row]:
        """Yield up to `count` rows.

        Raises:
            DataError: there are no rows to begin with.
        """
        if not rows:
            raise DataError("there are no rows to take as examples", hint="a handful of good ones is enough")
        schema = schema_of(rows[0])
        draw = random.Random(self.context.seed)
        pool = list(rows)
        old = _Wordings()
        for row in rows:
            old.add(compared_text(row))
        count = barren = round_ = alike = 0
        structure = _structure(schema) if self.config.structured else None
        while count < self.config.count and barren < BARREN:
            shown = [self._examples(pool, draw) for _ in range(self.config.count - count)]
            requests = [self._request(schema, some, f"{round_}.{place}") for place, some in enumerate(shown)]
            before = count
            for some, texts in zip(shown, self.ask(requests, json_schema=structure), strict=True):
                for text in texts:
                    row = self._row(schema, text)
                    if row is None:
                        continue
                    if old.likeness(compared_text(row)) >= self.config.similar:
                        alike += 1
                        continue
                    old.add(compared_text(row))
                    pool.append(row)
                    count += 1
                    yield {**row, PARENTS: sorted({parent(example) for example in some})}
            barren = 0 if count > before else barren + 1
            round_ += 1
        if alike:
            self.context.log(f"{alike} rows that were written are like an older one, and were left out")
        if count < self.config.count:
            self.context.warn(
                f"{count} of {self.config.count} rows were made: {BARREN} rounds brought nothing new; more seeds, a "
                "higher `temperature` or `similar` may help"
            )

    def _examples(self, pool: Sequence[Row], draw: random.Random) -> list[Row]:
        return draw.sample(pool, min(self.config.examples, len(pool)))

    def _request(self, schema: Schema, examples: Sequence[Row], number: str) -> list[Message]:
        """A request for one row; its number makes requests with the same examples different ones."""
        shown = "\n".join(
            json.dumps({column: row[column] for column in COLUMNS[schema]}, ensure_ascii=False) for row in examples
        )
        instruction = (
            f"You write data that a language model is trained with. {self.config.instruction}\nAnswer with one new row "
            "as a JSON object of the examples' form, on one line, and nothing else. It is about something else than "
            "the examples."
        )
        return told(instruction, f"Examples:\n{shown}\n\nNew row {number}:")

    def _row(self, schema: Schema, text: str) -> Row | None:
        """The row that an answer holds; None where it holds none, which is counted."""
        try:
            found: Any = json.loads(_FENCE.sub("", text))
            # An escape may hold half a sign, which no row can.
            json.dumps(found, ensure_ascii=False).encode()
            if not isinstance(found, dict):
                raise ValueError("no object")
            return checked(schema, found)
        except ValueError:
            self.problems["the answer is no JSON object"] += 1
        except DataError as error:
            self.problems[f"the answer {error.message}"] += 1
        return None


class _Wordings:
    """Texts, and how like a new one is to the likest of them."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._where: dict[int, list[int]] = {}

    def add(self, text: str) -> None:
        """Take a text."""
        found = _set(text)
        for shingle in found:
            self._where.setdefault(shingle, []).append(len(self._sizes))
        self._sizes.append(len(found))

    def likeness(self, text: str) -> float:
        """The largest Jaccard similarity of a text's shingles to those of a text before."""
        found = _set(text)
        common = Counter(place for shingle in found for place in self._where.get(shingle, ()))
        return max((both / (len(found) + self._sizes[place] - both) for place, both in common.items()), default=0.0)


def _set(text: str) -> set[int]:
    return set(shingles_of([text]).hashes.tolist())


def _structure(schema: Schema) -> dict[str, Any]:
    """The JSON schema of a row."""
    columns = COLUMNS[schema]
    return {
        "type": "object",
        "properties": {column: _COLUMNS.get(column, _TEXT) for column in columns},
        "required": list(columns),
        "additionalProperties": False,
    }
