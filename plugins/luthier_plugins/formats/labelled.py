"""The formats ``labelled`` and ``unpaired``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from luthier.api import Format, Row, Schema
from luthier.artifacts.rows import checked
from luthier_plugins.formats.config import LabelledConfig, UnpairedConfig


class Labelled(Format[LabelledConfig]):
    """Answers that are good ones or not."""

    schema: ClassVar[Schema] = "labelled"

    def recognises(self, raw: Mapping[str, Any]) -> bool:
        return {self.config.prompt, self.config.completion, self.config.label} <= set(raw)

    def parse(self, raw: Mapping[str, Any]) -> Iterable[Row]:
        keys = {"prompt": self.config.prompt, "completion": self.config.completion, "label": self.config.label}
        values = {name: raw.get(key) for name, key in keys.items()}
        if isinstance(values["label"], int) and values["label"] in (0, 1):
            values["label"] = bool(values["label"])
        yield checked("labelled", values)

    def keys_read(self, raw: Mapping[str, Any]) -> Iterable[str]:
        keys = (self.config.prompt, self.config.completion, self.config.label)
        return {name for key in keys for name in (key, f"{key}.role", f"{key}.content")}


class Unpaired(Format[UnpairedConfig]):
    """Preferences as two labelled answers each."""

    schema: ClassVar[Schema] = "labelled"

    def recognises(self, raw: Mapping[str, Any]) -> bool:
        # A pair says more than its two sides: taking it apart is for a recipe to ask.
        return False

    def parse(self, raw: Mapping[str, Any]) -> Iterable[Row]:
        for key, label in ((self.config.chosen, True), (self.config.rejected, False)):
            values = {"prompt": raw.get(self.config.prompt), "completion": raw.get(key), "label": label}
            yield checked("labelled", values)

    def keys_read(self, raw: Mapping[str, Any]) -> Iterable[str]:
        keys = (self.config.prompt, self.config.chosen, self.config.rejected)
        return {name for key in keys for name in (key, f"{key}.role", f"{key}.content")}
