"""The format ``alpaca``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast

from luthier.api import DataError, Format, Row, Schema
from luthier_plugins.formats.config import AlpacaConfig
from luthier_plugins.formats.parts import untrained, with_system


class Alpaca(Format[AlpacaConfig]):
    """Instructions with an answer each."""

    schema: ClassVar[Schema] = "messages"

    def recognises(self, raw: Mapping[str, Any]) -> bool:
        return {self.config.instruction, self.config.output} <= set(raw)

    def parse(self, raw: Mapping[str, Any]) -> Iterable[Row]:
        keys = (self.config.instruction, self.config.input, self.config.output)
        instruction, given, output = (raw.get(key) or "" for key in keys)
        for key, text in zip(keys, (instruction, given, output), strict=True):
            if not isinstance(text, str):
                raise DataError(f"has no text under '{key}'")
        asked = "\n\n".join(part for part in (instruction, given) if part.strip())
        if not asked:
            raise DataError(f"has no text under '{self.config.instruction}'")
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]
        yield {"messages": with_system(raw.get(self.config.system), [*self._earlier(raw), *turns])}

    def _earlier(self, raw: Mapping[str, Any]) -> list[Any]:
        pairs: Any = raw.get(self.config.history) or []
        found: list[Any] = []
        for pair in pairs:
            if not isinstance(pair, list) or len(cast("list[Any]", pair)) != 2:
                raise DataError(f"has no pairs of a question and an answer under '{self.config.history}'")
            found += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
        return untrained(found)

    def keys_read(self, raw: Mapping[str, Any]) -> Iterable[str]:
        config = self.config
        return {config.instruction, config.input, config.output, config.system, config.history}
