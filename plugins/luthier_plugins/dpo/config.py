"""The config of the stage ``dpo``."""

from __future__ import annotations

from luthier.api import Field, ObjectiveUse, PreferenceTuningConfig


class DpoConfig(PreferenceTuningConfig):
    """Trains on preference pairs. The reference is `model` itself, its adapter included."""

    objective: ObjectiveUse = Field(default="dpo")  # type: ignore[assignment]
    """What training minimises."""
    learning_rate: float = Field(default=1e-6, gt=0)
    """The peak learning rate."""
