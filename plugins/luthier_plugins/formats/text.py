"""The format ``text``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.api import DataError, Row
from luthier_plugins.formats.config import TextConfig


class Text:
    """Plain texts."""

    columns = ("text",)

    def __init__(self, config: TextConfig) -> None:
        self.field = config.field

    def parse(self, raw: Mapping[str, Any]) -> Row:
        value = raw.get(self.field)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"has no text under '{self.field}'")
        return {"text": value}
