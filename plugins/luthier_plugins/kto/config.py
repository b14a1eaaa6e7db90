"""The config of the stage ``kto``."""

from __future__ import annotations

from luthier.api import Field, ObjectiveUse, PreferenceTuningConfig


class KtoConfig(PreferenceTuningConfig):
    """Trains on answers that are good ones or not. The reference is `model` itself, its adapter included."""

    objective: ObjectiveUse = Field(default="kto")  # type: ignore[assignment]
    """What training minimises."""
    learning_rate: float = Field(default=1e-6, gt=0)
    """The peak learning rate."""
