"""The config of the stage ``dpo``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from luthier.api import DatasetInput, Field, ModelInput, PreferenceLossUse, TrainingConfig
from luthier.api.artifact import ArtifactKind


class DpoConfig(TrainingConfig):
    """Trains on preference pairs. The reference is `model` itself, its adapter included."""

    model: ModelInput
    """The model to train, and the reference."""
    data: DatasetInput
    """Preference pairs."""
    beta: float = Field(default=0.1, gt=0)
    """How strongly the model is held to the reference."""
    loss: PreferenceLossUse = Field(default="sigmoid")  # type: ignore[assignment]
    """The loss of a pair."""
    learning_rate: float = Field(default=1e-6, gt=0)
    """The peak learning rate of AdamW."""
    on_long: Literal["drop", "fail"] = "drop"
    """What to do with pairs longer than `max_length`: leave them out and say how many, or stop."""

    def produces(self, inputs: Mapping[str, Sequence[ArtifactKind]]) -> ArtifactKind:
        return "adapter" if "adapter" in inputs["model"] else "model"

    def problems(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        formats = [facts["format"] for facts in inputs.get("data", [])]
        return [f"dpo trains on preference pairs, not on {name}" for name in formats if name != "preference"]
