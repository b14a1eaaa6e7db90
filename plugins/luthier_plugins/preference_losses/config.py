"""The configs of the preference losses."""

from __future__ import annotations

from luthier.api import Config, Field


class SigmoidConfig(Config):
    """The DPO loss."""

    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """The assumed share of pairs whose labels are swapped."""


class OrpoLossConfig(Config):
    """The ORPO loss."""
