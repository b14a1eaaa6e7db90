"""The format ``preference``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from luthier.api import DataError, Message, Row
from luthier_plugins.formats.config import PreferenceConfig
from luthier_plugins.formats.turns import checked_conversation, checked_messages


class Preference:
    """Pairs of answers to one prompt."""

    columns = ("prompt", "chosen", "rejected")

    def __init__(self, config: PreferenceConfig) -> None:
        self.config = config

    def parse(self, raw: Mapping[str, Any]) -> Row:
        prompt = self._turns(raw, self.config.prompt, "user")
        if prompt[-1]["role"] == "assistant":
            raise DataError("the prompt ends with a turn of the assistant", hint="it has to end with the user's")
        chosen = self._answer(raw, self.config.chosen)
        rejected = self._answer(raw, self.config.rejected)
        if chosen == rejected:
            raise DataError("the chosen and the rejected answer are the same", hint="such a pair teaches nothing")
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    def _turns(self, raw: Mapping[str, Any], key: str, role: str) -> list[Message]:
        value = raw.get(key)
        if isinstance(value, str) and value:
            return [Message(role=role, content=value)]
        return checked_messages(cast("Any", value), key)

    def _answer(self, raw: Mapping[str, Any], key: str) -> list[Message]:
        turns = checked_conversation(self._turns(raw, key, "assistant"), key)
        if len(turns) != 1:
            raise DataError(f"'{key}' has {len(turns)} messages", hint="one assistant message is expected")
        return turns
