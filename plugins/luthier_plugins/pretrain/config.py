"""The config of the stage ``pretrain``."""

from __future__ import annotations

from luthier.api import Field, Schema, TrainingConfig


class PretrainConfig(TrainingConfig):
    """Trains every token of texts, and of conversations in the model's chat template, shuffled together."""

    max_length: int = Field(default=512, gt=1)
    """The length of a packed block in tokens; nothing is cut off."""

    @property
    def schemas(self) -> tuple[Schema, ...]:
        return ("text", "messages")
