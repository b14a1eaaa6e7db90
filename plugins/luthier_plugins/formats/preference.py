"""The format ``preference``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from luthier.api import Format, Row, Schema
from luthier.artifacts.rows import checked
from luthier_plugins.formats.config import PreferenceConfig


class Preference(Format[PreferenceConfig]):
    """Pairs of answers to one prompt."""

    schema: ClassVar[Schema] = "preference"

    def recognises(self, raw: Mapping[str, Any]) -> bool:
        return {self.config.prompt, self.config.chosen, self.config.rejected} <= set(raw)

    def parse(self, raw: Mapping[str, Any]) -> Iterable[Row]:
        keys = {"prompt": self.config.prompt, "chosen": self.config.chosen, "rejected": self.config.rejected}
        yield checked("preference", {name: raw.get(key) for name, key in keys.items()})

    def keys_read(self, raw: Mapping[str, Any]) -> Iterable[str]:
        keys = (self.config.prompt, self.config.chosen, self.config.rejected)
        return {name for key in keys for name in (key, f"{key}.role", f"{key}.content")}
