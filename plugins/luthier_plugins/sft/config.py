"""The config of the stage ``sft``."""

from __future__ import annotations

from luthier.api import Schema, TuningConfig


class SftConfig(TuningConfig):
    """Trains the assistant's turns of conversations, stop token included."""

    @property
    def schemas(self) -> tuple[Schema, ...]:
        # Texts have no answers, and no stop token: they are what `pretrain` packs into blocks.
        return tuple(schema for schema in super().schemas if schema != "text")
