"""The config of the stage ``diff``."""

from __future__ import annotations

from typing import ClassVar

from luthier.api import Field, ModelInput, StageConfig
from luthier.api.artifact import ArtifactKind


class DiffConfig(StageConfig):
    """Compares models of one architecture, parameter by parameter."""

    kind_made: ClassVar[ArtifactKind] = "report"
    seeded: ClassVar[bool] = False

    models: list[ModelInput] = Field(min_length=2)
    """The models."""
    base: ModelInput | None = None
    """Their ancestor: then their task vectors are compared, the differences to it."""
