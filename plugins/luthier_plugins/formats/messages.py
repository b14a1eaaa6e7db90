"""The format ``messages``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.api import Row
from luthier_plugins.formats.config import MessagesConfig
from luthier_plugins.formats.turns import checked_conversation


class Messages:
    """Conversations that end with the assistant."""

    columns = ("messages",)

    def __init__(self, config: MessagesConfig) -> None:
        self.field = config.field

    def parse(self, raw: Mapping[str, Any]) -> Row:
        return {"messages": checked_conversation(raw.get(self.field), self.field)}
