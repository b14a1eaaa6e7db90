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


class LionConfig(Config):
    """Lion; its learning rate is three to ten times smaller than AdamW's, its weight decay as much larger."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    """How much of the momentum is in an update, beside the gradient."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """The decay of the momentum."""


class AdafactorConfig(Config):
    """Adafactor; updates are scaled by the size of the weights, so its learning rate is larger than AdamW's."""

    beta2_decay: float = Field(default=-0.8, lt=0)
    """The power of the step by which the decay of the squared gradients approaches 1."""
    clipping: float = Field(default=1.0, ge=1)
    """The root mean square above which an update is scaled down."""


class MuonConfig(AdamwConfig):
    """Muon for the matrices of hidden layers, AdamW for embeddings, heads, norms and biases."""

    momentum: float = Field(default=0.95, ge=0, lt=1)
    """The decay of the momentum."""
    nesterov: bool = True
    """Whether the gradient is added to the momentum once more."""
