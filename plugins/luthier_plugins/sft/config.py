"""The config of the stage ``sft``."""

from __future__ import annotations

from luthier.api import Schema, TuningConfig
from pydantic import model_validator


class SftConfig(TuningConfig):
    """Trains the assistant's turns of conversations, stop token included."""

    @model_validator(mode="after")
    def _objective_fits(self) -> SftConfig:
        if not self.schemas:
            raise ValueError(f"the objective {self.objective.name} reads texts alone, which `pretrain` trains on")
        return self

    @property
    def schemas(self) -> tuple[Schema, ...]:
        # Texts have no answers, and no stop token: they are what `pretrain` packs into blocks.
        return tuple(schema for schema in super().schemas if schema != "text")
