"""The config of the stage ``dpo``."""

from __future__ import annotations

from luthier.api import Field, PreferenceLossUse, PreferenceTrainingConfig


class DpoConfig(PreferenceTrainingConfig):
    """Trains on preference pairs. The reference is `model` itself, its adapter included."""

    beta: float = Field(default=0.1, gt=0)
    """How strongly the model is held to the reference."""
    loss: PreferenceLossUse = Field(default="sigmoid")  # type: ignore[assignment]
    """The loss of a pair."""
    learning_rate: float = Field(default=1e-6, gt=0)
    """The peak learning rate of AdamW."""
