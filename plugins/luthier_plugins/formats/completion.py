"""The format ``prompt_completion``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from luthier.api import Format, Row, Schema
from luthier_plugins.formats.config import PromptCompletionConfig
from luthier_plugins.formats.parts import listed, role_keys, untrained, with_system


class PromptCompletion(Format[PromptCompletionConfig]):
    """Prompts with a completion each, which alone is trained."""

    schema: ClassVar[Schema] = "messages"

    def recognises(self, raw: Mapping[str, Any]) -> bool:
        # With a label it says more.
        return {self.config.prompt, self.config.completion} <= set(raw) and "label" not in raw

    def parse(self, raw: Mapping[str, Any]) -> Iterable[Row]:
        prompt = listed(raw.get(self.config.prompt), "user", self.config.prompt)
        said = listed(raw.get(self.config.completion), "assistant", self.config.completion)
        messages = [*untrained(prompt), *said]
        yield {"messages": with_system(raw.get(self.config.system), messages), "tools": raw.get("tools")}

    def keys_read(self, raw: Mapping[str, Any]) -> Iterable[str]:
        return {*role_keys(self.config.prompt, self.config.completion), self.config.system, "tools"}
