"""Thinking: what a model writes before its answer, and the marks that templates set around it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from luthier.api.data import Message

KNOWN = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)
"""The marks of published models: DeepSeek-R1 and Qwen3, Magistral, Seed-OSS, Kimi, Cohere, gpt-oss, and others."""
LITERAL = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"")
"""A text in a template's code."""
SHORTEST, LONGEST = 3, 60
"""Letters of a mark."""


@dataclass(frozen=True, slots=True)
class Thinking:
    """Where thinking begins and ends.

    Attributes:
        opens: The mark before it; a template may write it itself at the end of a prompt.
        closes: The mark behind it: what follows is the answer.
        opened: Whether prompts end with the mark before it, so that what a model says begins in the midst of thinking.
    """

    opens: str
    closes: str
    opened: bool = False

    def split(self, text: str, *, opened: bool = False) -> tuple[str, str]:
        """Thinking and answer. An answer that was cut while the model still thought is empty.

        Args:
            text: What was said.
            opened: Whether the prompt had opened the thinking.
        """
        before, mark, after = text.rpartition(self.closes)
        if mark:
            return before.strip().removeprefix(self.opens).strip(), after.lstrip()
        return (text.lstrip().removeprefix(self.opens), "") if self.unended(text, opened=opened) else ("", text)

    def unended(self, text: str, *, opened: bool = False) -> bool:
        """Whether an answer was cut while the model still thought."""
        return self.closes not in text and (opened or text.lstrip().startswith(self.opens))


USUAL = Thinking(*KNOWN[0])


def thinking_of(template: str | None, render: Callable[[Sequence[Message]], str]) -> Thinking | None:
    """The marks that a chat template cuts thinking at, or writes itself; None where it has none.

    A mark is known, or is a text in the template's code at which it cuts an assistant's message: that is tried.

    Args:
        template: The template.
        render: Renders a conversation with it.
    """
    if template is None:
        return None
    found = [Thinking(*marks) for marks in KNOWN if all(mark.partition("<|message|>")[0] in template for mark in marks)]
    if found:
        return found[0]
    literals = dict.fromkeys(one or other for one, other in LITERAL.findall(template))
    for closes in literals:
        if SHORTEST <= len(closes) <= LONGEST and _cuts(closes, render):
            return Thinking(closes.replace("/", "", 1), closes)
    return None


def _cuts(mark: str, render: Callable[[Sequence[Message]], str]) -> bool:
    user, answer = Message(role="user", content="One?"), Message(role="assistant", content=f"alpha{mark}omega")
    try:
        text = render([user, answer, user])
    # A template may raise anything at a message that it does not expect.
    except Exception:  # noqa: BLE001
        return False
    return "alpha" not in text and "omega" in text
