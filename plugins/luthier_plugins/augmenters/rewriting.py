"""The augmenters ``paraphrase`` and ``back_translate``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from luthier.api import Message, Row
from luthier.api.data import PARENTS
from luthier.serving.judging import told
from luthier_plugins.augmenters.asking import Asking, parent, same
from luthier_plugins.augmenters.config import BackTranslateConfig, ParaphraseConfig

WRITTEN_AGAIN = "the new wording is the old one"


def _column(row: Row) -> str:
    return "messages" if "messages" in row else "prompt"


def last_asked(row: Row) -> str | None:
    """What the user says in their last turn; None where no user says anything."""
    turns = [message["content"] for message in row.get(_column(row)) or () if message["role"] == "user"]
    return turns[-1] if turns and turns[-1].strip() else None


def asked_anew(row: Row, text: str) -> Row:
    """A row whose last turn of the user is another text, and which names the row that it is made of."""
    column = _column(row)
    turns: list[Message] = list(row[column])
    place = max(place for place, message in enumerate(turns) if message["role"] == "user")
    turns[place] = {**turns[place], "content": text}
    return {**row, column: turns, PARENTS: [parent(row)]}


class Paraphrase(Asking[ParaphraseConfig]):
    """The augmenter ``paraphrase``."""

    def made(self, rows: Sequence[Row]) -> Iterator[Row]:
        asking = [(row, text) for row in rows if (text := last_asked(row)) is not None]
        if len(asking) < len(rows):
            self.problems["has no turn of a user"] += len(rows) - len(asking)
        requests = [told(self.config.instruction, text) for _, text in asking]
        for (row, _), texts in zip(asking, self.ask(requests, self.config.count), strict=True):
            for text in texts:
                yield asked_anew(row, text)


class BackTranslate(Asking[BackTranslateConfig]):
    """The augmenter ``back_translate``."""

    def made(self, rows: Sequence[Row]) -> Iterator[Row]:
        asking = [(row, text) for row in rows if (text := last_asked(row)) is not None]
        if len(asking) < len(rows):
            self.problems["has no turn of a user"] += len(rows) - len(asking)
        for between in self.config.by_way_of:
            there = self._translated([text for _, text in asking], between)
            back = iter(self._translated([text for text in there if text is not None], self.config.language))
            for (row, old), translated in zip(asking, there, strict=True):
                text = next(back) if translated is not None else None
                if text is not None and same(text, old):
                    self.problems[WRITTEN_AGAIN] += 1
                elif text is not None:
                    yield asked_anew(row, text)

    def _translated(self, texts: Sequence[str], language: str) -> list[str | None]:
        """Each text in a language; None where the generator does not translate it."""
        instruction = (
            f"Translate the user's text into {language}. Keep names, numbers and formats. Answer with the translation "
            "alone."
        )
        requests = [told(instruction, text) for text in texts]
        return [found[0] if found else None for found in self.ask(requests)]
