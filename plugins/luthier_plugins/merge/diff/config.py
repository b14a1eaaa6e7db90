"""The config of the stage ``diff``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from luthier.api import Field, ModelInput, StageConfig, full_precision_problems
from luthier.api.artifact import ArtifactKind


class DiffConfig(StageConfig):
    """Compares models of one architecture, parameter by parameter."""

    kind_made: ClassVar[ArtifactKind] = "report"
    seeded: ClassVar[bool] = False

    models: list[ModelInput] = Field(min_length=2)
    """The models."""
    base: ModelInput | None = None
    """Their ancestor: then their task vectors are compared, the differences to it."""

    def early_problems(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        return full_precision_problems(inputs, ("models", "base"), "take the models before they were quantized")
