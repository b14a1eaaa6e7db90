"""The augmenter ``edits``."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from luthier.api import Augmenter, DataError, Row
from luthier.api.data import PARENTS
from luthier_plugins.augmenters.asking import parent
from luthier_plugins.augmenters.config import EditsConfig

_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_BESIDE = {
    letter: row[max(0, place - 1) : place] + row[place + 1 : place + 2]
    for row in _KEYS
    for place, letter in enumerate(row)
}
_ENDS = ".!?,;:…"


class Edits(Augmenter[EditsConfig]):
    """The augmenter ``edits``. A row that no edit changes is not repeated."""

    def rows(self, rows: Sequence[Row]) -> Iterator[Row]:
        draw = random.Random(self.context.seed)
        if rows and "text" in rows[0]:
            raise DataError("texts have no turns of a user to edit", hint="edits are for conversations and prompts")
        for row in rows:
            for _ in range(self.config.count):
                edited = {
                    column: [self._turn(message, draw) for message in row[column]] if column in row else None
                    for column in ("messages", "prompt")
                }
                changed = {column: turns for column, turns in edited.items() if turns is not None}
                if any(turns != row[column] for column, turns in changed.items()):
                    yield {**row, **changed, PARENTS: [parent(row)]}

    def _turn(self, message: Any, draw: random.Random) -> Any:
        if message["role"] != "user":
            return message
        text = self._with_typos(message["content"], draw)
        if draw.random() < self.config.no_punctuation:
            text = text.rstrip(_ENDS) or text
        casing = draw.random()
        if casing < self.config.lower:
            text = text.lower()
        elif casing < self.config.lower + self.config.upper:
            text = text.upper()
        return {**message, "content": text}

    def _with_typos(self, text: str, draw: random.Random) -> str:
        made: list[str] = []
        letters = list(text)
        place = 0
        while place < len(letters):
            letter = letters[place]
            place += 1
            # Digits stay: with another number the answer would be wrong.
            if not letter.isalpha() or draw.random() >= self.config.typos:
                made.append(letter)
                continue
            kind = draw.choice(("left out", "doubled", "swapped", "beside"))
            following = letters[place] if place < len(letters) else ""
            if kind == "doubled":
                made += [letter, letter]
            elif kind == "swapped" and following.isalpha():
                made += [following, letter]
                place += 1
            elif kind == "beside" and letter.lower() in _BESIDE:
                hit = draw.choice(_BESIDE[letter.lower()])
                made.append(hit.upper() if letter.isupper() else hit)
            elif kind != "left out":
                made.append(letter)
        return "".join(made)
