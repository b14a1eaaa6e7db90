"""Hands a model to an exporter."""

from __future__ import annotations

from typing import Any

from luthier.api import Exporter, Facts, Stage
from luthier_plugins.export.config import ExportConfig


class Export(Stage[ExportConfig]):
    """The stage ``export``."""

    def run(self) -> Facts:
        source = self.context.artifact(self.config.model)
        exporter: Exporter[Any] = self.context.build(self.config.format)
        facts = exporter.export(source)
        carried = {name: source.facts[name] for name in ("architecture", "tokenizer", "chat_template", "stop_tokens")}
        return {**carried, "format": self.config.format.name, "model": source.key, **facts}
