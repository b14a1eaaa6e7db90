"""The formats ``labelled`` and ``unpaired``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from luthier.api import Format, Row, Schema
from luthier_plugins.formats.config import LabelledConfig, UnpairedConfig
from luthier_plugins.formats.parts import role_keys
from luthier_plugins.formats.preference import pair_of

WORDS = {"true": True, "false": False, "1": True, "0": False}
"""Labels as tables of texts have them."""


class Labelled(Format[LabelledConfig]):
    """Answers that are good ones or not."""

    schema: ClassVar[Schema] = "labelled"

    def recognises(self, raw: Mapping[str, Any]) -> bool:
        return {self.config.prompt, self.config.completion, self.config.label} <= set(raw)

    def parse(self, raw: Mapping[str, Any]) -> Iterable[Row]:
        label = raw.get(self.config.label)
        if isinstance(label, int) and label in (0, 1):
            label = bool(label)
        elif isinstance(label, str):
            label = WORDS.get(label.strip().lower(), label)
        prompt, completion = raw.get(self.config.prompt), raw.get(self.config.completion)
        yield {"prompt": prompt, "completion": completion, "label": label, "tools": raw.get("tools")}

    def keys_read(self, raw: Mapping[str, Any]) -> Iterable[str]:
        return {*role_keys(self.config.prompt, self.config.completion), self.config.label, "tools"}


class Unpaired(Format[UnpairedConfig]):
    """Preferences as two labelled answers each."""

    schema: ClassVar[Schema] = "labelled"

    def recognises(self, raw: Mapping[str, Any]) -> bool:
        # A pair says more than its two sides: taking it apart is for a recipe to ask.
        return False

    def parse(self, raw: Mapping[str, Any]) -> Iterable[Row]:
        pair = pair_of(raw, self.config)
        for side, label in (("chosen", True), ("rejected", False)):
            yield {"prompt": pair["prompt"], "completion": pair[side], "label": label, "tools": raw.get("tools")}

    def keys_read(self, raw: Mapping[str, Any]) -> Iterable[str]:
        return {*role_keys(self.config.prompt, self.config.chosen, self.config.rejected), "tools"}
