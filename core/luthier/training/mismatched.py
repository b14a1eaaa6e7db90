"""Answers that do not belong to their prompts: what shows how far a model has moved, whatever it is asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from luthier.api.errors import DataError
from luthier.modeling.text import IGNORED, Encoded
from luthier.training.encoding import EncodedRow
from luthier.training.references import ReferencedRows

TRIED = 64
"""Rows that are looked at for one with another prompt."""


class Mismatched(Sequence[EncodedRow]):
    """For each row its prompt with the answer of another row, the same one each time.

    Args:
        rows: Rows of one completion each.
        longest: The most tokens that may come out; an answer ends before its end where it has to.

    Raises:
        DataError: there is one row alone.
    """

    def __init__(self, rows: Sequence[EncodedRow], longest: int) -> None:
        if len(rows) < 2:
            raise DataError("the objective compares answers with those to other prompts, and there is one row alone")
        self._rows, self._longest = rows, longest

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        mine = self._rows[place].completions[0]
        prompt = mine.input_ids[: _first(mine)]
        elsewhere = (item for item in self._others(place) if item.input_ids[: _first(item)] != prompt)
        other = next(elsewhere, None) or next(self._others(place))
        room = max(1, self._longest - len(prompt))
        answer = other.input_ids[_first(other) :][:room]
        return EncodedRow((Encoded([*prompt, *answer], [IGNORED] * len(prompt) + [*answer]),))

    def _others(self, place: int) -> Iterator[Encoded]:
        """Completions of other rows. Those that follow each other are often answers to one prompt, so the first is from
        far away."""
        count = len(self._rows)
        for number in range(min(TRIED, count - 1)):
            step = 1 + (count // 2 - 1 + number) % (count - 1)
            yield self._rows[(place + step) % count].completions[0]


class WithMismatched(Sequence[EncodedRow]):
    """Rows, each with its mismatched one.

    Args:
        rows: The rows.
        others: As many, see `Mismatched`.
    """

    def __init__(self, rows: ReferencedRows, others: Sequence[EncodedRow]) -> None:
        self._rows, self._others = rows, others

    @property
    def lengths(self) -> np.ndarray:
        """The tokens of each row, shape (rows,)."""
        return self._rows.lengths

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        return replace(self._rows[place], mismatched=self._others[place])


def _first(item: Encoded) -> int:
    """The place of the first token of an answer."""
    return next((place for place, label in enumerate(item.labels) if label != IGNORED), len(item.labels))
