"""The configs of the optimizers."""

from __future__ import annotations

from luthier.api import Config, Field


class AdamwConfig(Config):
    """AdamW; learning rate, schedule and weight decay are the stage's."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    """The decay of the mean of gradients."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """The decay of the mean of squared gradients."""
    eps: float = Field(default=1e-8, gt=0)
    """What is added to the root of the mean of squared gradients."""
