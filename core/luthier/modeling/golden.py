"""Entries of golden files: conversations, the tokens that they become, and what the model answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from luthier.api.artifact import Artifact
from luthier.api.data import Message, Row
from luthier.api.serving import Generator, Sampling
from luthier.artifacts.datasets import read_split
from luthier.artifacts.rows import prompt_of
from luthier.modeling.chat import ChatEncoder
from luthier.modeling.text import render

ENTRIES = 16
LIMIT = 48
"""The most tokens of a golden answer."""
HELLO: list[Message] = [Message(role="user", content="Hello, who are you?")]


def conversations_of(data: Sequence[Artifact]) -> list[list[Message]]:
    """Some conversations of the recipe's own, without their last answers, and one that everybody begins with."""
    found = [HELLO]
    rows: Iterator[Row] = (row for item in data for row in read_split(item, "train"))
    for row in rows:
        messages = prompt_of(row)
        # Servers spell tools and their calls in ways of their own.
        plain = not messages.tools and not any("tool_calls" in item for item in messages)
        if plain and messages and messages[-1]["role"] == "user" and messages not in found:
            found.append(messages)
        if len(found) == ENTRIES:
            break
    return found


def entries_of(
    tokenizer: Any,
    conversations: Sequence[Sequence[Message]],
    generator: Generator[Any],
    room: int,
) -> list[dict[str, Any]]:
    """Golden entries of conversations; empty for a model without a chat template.

    Args:
        generator: What answers.
        room: The context in tokens; conversations that leave no room for an answer are left out.
    """
    if tokenizer.chat_template is None:
        return []
    encoder = ChatEncoder(tokenizer)
    # Servers obey the names of control tokens in a message, which a model of ours has never seen there.
    conversations = [messages for messages in conversations if encoder.holds_control(messages) is None]
    ids = [encoder.prompt(messages) for messages in conversations]
    short = [place for place, prompt in enumerate(ids) if len(prompt) + LIMIT <= room]
    chosen = [conversations[place] for place in short]
    answers = generator.generate(chosen, Sampling(max_new_tokens=LIMIT))
    return [
        {
            "messages": list(messages),
            "prompt": render(tokenizer, messages, open_turn=True),
            "prompt_ids": ids[place],
            "answer": answer.text,
        }
        for place, messages, (answer,) in zip(short, chosen, answers, strict=True)
    ]
