"""The format ``prompt``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from luthier.api import Format, Row, Schema
from luthier_plugins.formats.config import PromptConfig
from luthier_plugins.formats.parts import role_keys

ANSWERS = frozenset(("completion", "chosen", "rejected"))
"""What other formats have beside a prompt."""


class Prompt(Format[PromptConfig]):
    """Prompts that something else answers: a teacher, or the model that learns from rewards."""

    schema: ClassVar[Schema] = "prompt"

    def recognises(self, raw: Mapping[str, Any]) -> bool:
        return self.config.prompt in raw and not ANSWERS & raw.keys()

    def parse(self, raw: Mapping[str, Any]) -> Iterable[Row]:
        yield {"prompt": raw.get(self.config.prompt), "tools": raw.get("tools")}

    def keys_read(self, raw: Mapping[str, Any]) -> Iterable[str]:
        return {*role_keys(self.config.prompt), "tools"}
