"""The format ``text``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from luthier.api import DataError, Format, Row, Schema
from luthier_plugins.formats.config import TextConfig


class Text(Format[TextConfig]):
    """Plain texts."""

    schema: ClassVar[Schema] = "text"

    def recognises(self, raw: Mapping[str, Any]) -> bool:
        return isinstance(raw.get(self.config.field), str)

    def parse(self, raw: Mapping[str, Any]) -> Iterable[Row]:
        value = raw.get(self.config.field)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"has no text under '{self.config.field}'")
        yield {"text": value}
