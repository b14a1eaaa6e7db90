"""The configs of the regularizers."""

from __future__ import annotations

from luthier.api import Config, DatasetInput, Field


class L2spConfig(Config):
    """L2-SP."""

    strength: float = Field(default=0.01, gt=0)
    """What half of the squared distance is multiplied by."""


class EwcConfig(Config):
    """Elastic weight consolidation."""

    data: DatasetInput
    """What the model is to keep: conversations, preferences or texts."""
    rows: int = Field(default=256, gt=0)
    """How many of its training rows the Fisher information is estimated from."""
    strength: float = Field(default=1.0, gt=0)
    """What half of the weighted squared distance is multiplied by."""
