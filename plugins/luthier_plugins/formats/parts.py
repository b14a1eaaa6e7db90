"""What formats put prompts and answers together from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from luthier.api import DataError
from luthier.artifacts.messages import KEYS


def listed(value: Any, role: str, field: str) -> list[Any]:
    """Messages: those of a list, or one of this role.

    Raises:
        DataError: there is neither a text nor a list.
    """
    if isinstance(value, str) and value:
        return [{"role": role, "content": value}]
    if isinstance(value, list) and value:
        return list(cast("list[Any]", value))
    raise DataError(f"has no text or messages under '{field}'")


def with_system(prompt: Any, messages: Sequence[Any]) -> list[Any]:
    """Messages behind a system prompt, where there is one.

    Raises:
        DataError: it is no text.
    """
    if prompt is None or prompt == "":
        return list(messages)
    if not isinstance(prompt, str):
        raise DataError("has no text under 'system'")
    return [{"role": "system", "content": prompt}, *messages]


def untrained(messages: Sequence[Any]) -> list[Any]:
    """Messages of which no turn of the assistant is trained, unless it says so itself."""
    return [{"train": False, **item} if _is_answer(item) else item for item in messages]


def _is_answer(item: Any) -> bool:
    return isinstance(item, dict) and cast("dict[str, Any]", item).get("role") == "assistant"


def role_keys(*fields: str) -> set[str]:
    """What is read where these fields are lists of messages."""
    return {name for field in fields for name in (field, *(f"{field}.{key}" for key in KEYS))}
