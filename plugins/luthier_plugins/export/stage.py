"""Hands a model to an exporter."""

from __future__ import annotations

from luthier.api import Exporter, Facts, StageContext
from luthier_plugins.export.config import ExportConfig


class Export:
    """The stage ``export``."""

    def __init__(self, config: ExportConfig) -> None:
        self.config = config

    def run(self, context: StageContext) -> Facts:
        source = context.input("model")
        exporter: Exporter = context.component(self.config.format)
        facts = exporter.export(source, context)
        carried = {name: source.facts[name] for name in ("architecture", "tokenizer", "chat_template", "stop_tokens")}
        return {**carried, "format": self.config.format.name, "model": source.key, **facts}
