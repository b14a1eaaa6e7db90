"""The format ``sharegpt``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast

from luthier.api import DataError, Format, Row, Schema
from luthier.artifacts.messages import KEYS
from luthier_plugins.formats.config import ShareGptConfig
from luthier_plugins.formats.parts import with_system

SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
"""Who speaks, by the names that are in use."""
CALLS = ("function_call", "tool_call")
"""Turns whose text is a call of a function, or a list of them."""


class ShareGpt(Format[ShareGptConfig]):
    """Conversations whose turns have ``from`` and ``value``."""

    schema: ClassVar[Schema] = "messages"

    def recognises(self, raw: Mapping[str, Any]) -> bool:
        return self.config.field in raw

    def parse(self, raw: Mapping[str, Any]) -> Iterable[Row]:
        turns: Any = raw.get(self.config.field)
        if not isinstance(turns, list) or not turns:
            raise DataError(f"has no turns under '{self.config.field}'")
        messages = [_message(turn, place) for place, turn in enumerate(cast("list[Any]", turns))]
        yield {"messages": with_system(raw.get("system"), messages), "tools": raw.get("tools")}

    def keys_read(self, raw: Mapping[str, Any]) -> Iterable[str]:
        inside = {f"{self.config.field}.{key}" for key in ("from", "value", *KEYS)}
        return {self.config.field, "system", "tools", *inside}


def _message(turn: Any, place: int) -> Any:
    if not isinstance(turn, Mapping) or "from" not in turn:
        # As some of these sets have them, with roles.
        return turn
    about = dict(cast("Mapping[str, Any]", turn))
    speaker = about.pop("from")
    if speaker not in SPEAKERS:
        raise DataError(f"turn {place} is from {speaker!r}", hint=f"known are {', '.join(SPEAKERS)}")
    value = about.pop("value", None)
    if speaker not in CALLS:
        return {**about, "role": SPEAKERS[speaker], "content": value}
    try:
        calls = json.loads(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"turn {place} is a function call, and no JSON of one") from error
    return {**about, "role": "assistant", "content": None, "tool_calls": calls if isinstance(calls, list) else [calls]}
