"""The config of the stage ``orpo``."""

from __future__ import annotations

from luthier.api import Field, PreferenceTrainingConfig


class OrpoConfig(PreferenceTrainingConfig):
    """Trains on preference pairs in one step: the loss of fine-tuning on the chosen answers, and the odds ratio."""

    beta: float = Field(default=0.1, gt=0)
    """The weight of the odds ratio beside the loss of the chosen answers (lambda in the paper)."""
    learning_rate: float = Field(default=8e-6, gt=0)
    """The peak learning rate of AdamW."""
