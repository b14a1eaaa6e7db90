"""The config of the stage ``sft``."""

from __future__ import annotations

from typing import Literal

from luthier.api import Schema, TuningConfig
from pydantic import model_validator


class SftConfig(TuningConfig):
    """Trains the assistant's turns of conversations, stop token included."""

    answers: Literal["all", "apart", "last"] = "all"
    """Which answers of a conversation are trained. `all`: each, in one sequence where that shows every one of them
    behind the prompt that a server makes; `apart`: each in a sequence of its own; `last`: the last one."""

    @model_validator(mode="after")
    def _objective_fits(self) -> SftConfig:
        if not self.schemas:
            raise ValueError(f"the objective {self.objective.name} reads texts alone, which `pretrain` trains on")
        return self

    @property
    def schemas(self) -> tuple[Schema, ...]:
        # Texts have no answers, and no stop token: they are what `pretrain` packs into blocks.
        return tuple(schema for schema in super().schemas if schema != "text")

    @property
    def trained_answers(self) -> Literal["all", "apart", "last"]:
        return self.answers
