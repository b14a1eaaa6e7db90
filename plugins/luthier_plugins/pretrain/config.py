"""The config of the stage ``pretrain``."""

from __future__ import annotations

from luthier.api import Field, Schema, TrainingConfig
from pydantic import model_validator


class PretrainConfig(TrainingConfig):
    """Trains every token of texts, and of conversations in the model's chat template, shuffled together."""

    max_length: int = Field(default=512, gt=1)
    """The length of a packed block in tokens, which the model's context has to hold; nothing is cut off."""
    across_documents: bool = False
    """Whether tokens see the documents before theirs in a block; by default each document stands alone, with positions
    of its own."""

    @model_validator(mode="after")
    def _objective_fits(self) -> PretrainConfig:
        if not {"text", "messages"} & set(super().schemas):
            raise ValueError(
                f"the objective {self.objective.name} reads rows of the schema {' or '.join(super().schemas)}, which "
                "packed blocks of text are not"
            )
        return self

    @property
    def schemas(self) -> tuple[Schema, ...]:
        return ("text", "messages")
