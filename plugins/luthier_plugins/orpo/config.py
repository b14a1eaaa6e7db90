"""The config of the stage ``orpo``."""

from __future__ import annotations

from luthier.api import Field, ObjectiveUse, PreferenceTuningConfig


class OrpoConfig(PreferenceTuningConfig):
    """Trains on preference pairs in one step: the loss of fine-tuning on the chosen answers, and the odds ratio."""

    objective: ObjectiveUse = Field(default="orpo")  # type: ignore[assignment]
    """What training minimises."""
    learning_rate: float = Field(default=8e-6, gt=0)
    """The peak learning rate."""
