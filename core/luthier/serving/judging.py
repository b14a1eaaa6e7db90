"""Judging answers: a generator that gives marks."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from luthier.api.context import Context
from luthier.api.data import Message
from luthier.api.judging import JudgeConfig
from luthier.serving.asking import Asker

_MARK = re.compile(r"\s*\W{0,3}(\d+(?:\.\d+)?)\b")
THINKING = re.compile(r"^\s*<think>.*?</think>\s*", re.DOTALL)
"""What reasoning models say first where their server leaves it in the answer."""


def told(instruction: str | None, text: str) -> list[Message]:
    """A request of one turn."""
    first = [Message(role="system", content=instruction)] if instruction else []
    return [*first, Message(role="user", content=text)]


class Judge:
    """Gives marks to answers.

    Args:
        config: Its config.
        context: The stage's context.
        asker: Who asks it, where that is known already.
    """

    def __init__(self, config: JudgeConfig, context: Context, asker: Asker | None = None) -> None:
        self._config = config
        self._context = context
        self._asker = asker

    def marks(self, talks: Sequence[Sequence[Message]]) -> list[float | None]:
        """A mark from 1 to `best` for the last turn of each conversation; None where the judge's answer has none."""
        instruction = (
            f"You judge answers. A good answer: {self._config.rubric}\nGive the last answer of the conversation a mark "
            f"from 1 (bad) to {self._config.best} (perfect). Answer with the number alone."
        )
        requests = [told(instruction, written(talk)) for talk in talks]
        sampling = self._config.sampling(self._context.seed)
        if self._asker is not None:
            return [self._mark(THINKING.sub("", answer.text)) for (answer,) in self._asker.ask(requests, sampling)]
        with self._context.build(self._config.generator) as generator:
            answers = Asker(generator, self._context).ask(requests, sampling)
            return [self._mark(THINKING.sub("", answer.text)) for (answer,) in answers]

    def _mark(self, text: str) -> float | None:
        found = _MARK.match(text)
        if found is None:
            return None
        mark = float(found[1])
        return mark if 1 <= mark <= self._config.best else None


def written(talk: Sequence[Message]) -> str:
    """A conversation as a text to be judged, so that the judge does not take part in it; calls as they are."""
    turns = [
        f"[{message['role']}]\n{message['content']}"
        + "".join(f"\n{json.dumps(call['function'], ensure_ascii=False)}" for call in message.get("tool_calls") or ())
        for message in talk
    ]
    return "\n\n".join(turns)
