"""The format ``messages``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from luthier.api import Format, Row, Schema
from luthier.artifacts.messages import KEYS
from luthier_plugins.formats.config import MessagesConfig


class Messages(Format[MessagesConfig]):
    """Conversations that end with the assistant."""

    schema: ClassVar[Schema] = "messages"

    def recognises(self, raw: Mapping[str, Any]) -> bool:
        return self.config.field in raw

    def parse(self, raw: Mapping[str, Any]) -> Iterable[Row]:
        yield {"messages": raw.get(self.config.field), "tools": raw.get("tools")}

    def keys_read(self, raw: Mapping[str, Any]) -> Iterable[str]:
        return {self.config.field, "tools", *(f"{self.config.field}.{key}" for key in KEYS)}
