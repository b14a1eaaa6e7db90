"""Checks messages, one by one and in their order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from luthier.api import DataError, Message

ROLES = ("system", "user", "assistant", "tool")


def checked_messages(value: Any, field: str) -> list[Message]:
    """A list of messages with known roles and texts.

    Raises:
        DataError: what is wrong, and at which message.
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"has no messages under '{field}'", hint='a row looks like {"messages": [{"role": "user", ...')
    return [_checked(item, index) for index, item in enumerate(cast("list[Any]", value))]


def _checked(item: Any, index: int) -> Message:
    if not isinstance(item, Mapping):
        raise DataError(f"message {index} is not an object with 'role' and 'content'")
    message = cast("Mapping[str, Any]", item)
    if message.get("tool_calls"):
        raise DataError(f"message {index} has tool calls, which would be lost", hint="write them into its content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"message {index} has the unknown role {role!r}", hint=f"roles are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise DataError(f"message {index} has no text under 'content'")
    return Message(role=role, content=content)


def checked_conversation(value: Any, field: str) -> list[Message]:
    """Messages that end with a turn of the assistant, which is what is trained.

    Raises:
        DataError: the last turn is somebody else's, or says nothing.
    """
    messages = checked_messages(value, field)
    last = messages[-1]
    if last["role"] != "assistant":
        raise DataError(f"ends with a turn of the {last['role']}", hint="the last turn has to be the assistant's")
    if not last["content"].strip():
        raise DataError("the assistant's last turn is empty")
    return messages
