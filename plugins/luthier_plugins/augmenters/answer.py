"""The augmenter ``answer``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from luthier.api import Message, Row, Schema
from luthier.api.data import PARENTS, TOOLS, Conversation
from luthier.artifacts.rows import prompt_of
from luthier_plugins.augmenters.asking import Asking, beside, parent, scores
from luthier_plugins.augmenters.config import AnswerConfig


class Answer(Asking[AnswerConfig]):
    """The augmenter ``answer``."""

    def makes(self, given: Schema) -> Schema:
        return "preference" if self.config.choose == "pairs" else "messages"

    def made(self, rows: Sequence[Row]) -> Iterator[Row]:
        asking = [row for row in rows if prompt_of(row)]
        self.problems["has nothing but an answer"] += len(rows) - len(asking)
        self.problems = +self.problems
        first = [Message(role="system", content=self.config.system)] if self.config.system else []
        requests = [Conversation([*first, *prompt_of(row)], prompt_of(row).tools) for row in asking]
        # Of several answers some may be bad: what counts is whether a row can be made.
        several = self.config.choose != "all"
        answered = list(zip(asking, self.ask(requests, self.config.samples, counted=not several), strict=True))
        if self.config.choose == "all":
            for row, texts in answered:
                for text in texts:
                    yield _answered(row, text)
            return
        flat = [(row, text) for row, texts in answered for text in dict.fromkeys(texts)]
        talks = [[*prompt_of(row), Message(role="assistant", content=text)] for row, text in flat]
        given = [row for row, _ in flat]
        found = iter(scores(self.context, self.config.judge, self.config.reward, talks, given, self.judge_asker))
        for row, texts in answered:
            if not texts:
                self.problems["none of the answers to the prompt can be used"] += 1
                continue
            marked = [(next(found), text) for text in dict.fromkeys(texts)]
            yield from self._chosen(row, [(mark, text) for mark, text in marked if mark is not None])

    def _chosen(self, row: Row, marked: Sequence[tuple[float, str]]) -> Iterator[Row]:
        """The row of a prompt's best answer, or of its best and its worst."""
        if not marked:
            self.problems["no answer to the prompt got a mark"] += 1
            return
        best, worst = max(marked, key=lambda item: item[0]), min(marked, key=lambda item: item[0])
        if self.config.choose == "best":
            yield _answered(row, best[1])
        elif best[0] > worst[0] and best[0] - worst[0] >= self.config.gap:
            sides = {"chosen": best[1], "rejected": worst[1]}
            yield {**_asked(row), "prompt": list(prompt_of(row)), **sides}
        else:
            self.problems["its answers are as good as each other"] += 1


def _asked(row: Row) -> Row:
    """What a new row has of the one whose prompt it answers."""
    about: dict[str, Any] = {**beside(row), PARENTS: [parent(row)]}
    return {**about, TOOLS: row[TOOLS]} if row.get(TOOLS) else about


def _answered(row: Row, text: str) -> Row:
    return {**_asked(row), "messages": [*prompt_of(row), Message(role="assistant", content=text)]}
