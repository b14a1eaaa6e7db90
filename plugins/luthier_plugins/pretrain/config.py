"""The config of the stage ``pretrain``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from luthier.api import DatasetInputs, Field, Input, TrainingConfig, other_formats
from luthier.api.artifact import ArtifactKind


class PretrainConfig(TrainingConfig):
    """Trains every token of texts, and of conversations in the model's chat template."""

    kind_made: ClassVar[ArtifactKind] = "model"

    model: Annotated[str, Input(("model",))]
    """The model to train on."""
    data: DatasetInputs
    """Texts or conversations; all are shuffled together."""
    max_length: int = Field(default=512, gt=1)
    """The length of a packed block in tokens; nothing is cut off."""

    def problems(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        return other_formats("pretrain", inputs, ("text", "messages"))
