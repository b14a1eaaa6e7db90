"""The configs: pydantic only."""

from typing import ClassVar

from luthier.api import Config, Field, GeneratorUse, MetricConfig, ObjectiveConfig, Schema


class DialogsConfig(Config):
    """Nothing to choose."""


class ThumbsConfig(Config):
    """Nothing to choose."""


class ApprovalConfig(ObjectiveConfig):
    """Kahneman-Tversky optimization with a reference point of zero."""

    schemas: ClassVar[tuple[Schema, ...]] = ("labelled",)

    beta: float = Field(default=0.1, gt=0)
    """How strongly the model is held to the reference."""
    undesirable: float = Field(default=1.0, gt=0)
    """What undesirable answers count."""


class FocalConfig(ObjectiveConfig):
    """Cross-entropy in which each token counts (1 - p) ** gamma."""

    gamma: float = Field(default=2.0, ge=0)
    """How much likely tokens are played down."""


class DriftConfig(MetricConfig):
    """Nothing to choose."""


class JudgedConfig(MetricConfig):
    """Asks somebody else."""

    judge: GeneratorUse
    """Who is asked."""
    column: str = "level"
    """A column of the rows that the judge gets."""


class SqliteConfig(Config):
    """A database for each stage and key."""

    file: str = "metrics.db"
    """Its name."""


class ConfidenceConfig(Config):
    """A penalty on the likelihood of targets."""

    strength: float = Field(default=0.01, gt=0)
    """What it is multiplied with."""


class MomentumConfig(Config):
    """SGD."""

    momentum: float = Field(default=0.9, ge=0, lt=1)
    """How much of the last step goes into the next."""


class AskedConfig(Config):
    """Asks a generator the rows' own questions again."""

    generator: GeneratorUse
    """Who answers."""
    max_new_tokens: int = Field(default=8, gt=0)
    """The maximum number of tokens in an answer."""


class NiceConfig(Config):
    """Workers under ``nice``."""

    slots: int = Field(default=2, gt=0)
    """How many stages run side by side."""
    niceness: int = Field(default=3, ge=0, le=19)
    """How far they stand back."""
