"""The configs of the objectives."""

from __future__ import annotations

from typing import ClassVar

from luthier.api import Field, ObjectiveConfig, Schema


class CrossEntropyConfig(ObjectiveConfig):
    """Nothing to choose."""

    schemas: ClassVar[tuple[Schema, ...]] = ("messages", "text")


class DpoConfig(ObjectiveConfig):
    """The DPO loss."""

    schemas: ClassVar[tuple[Schema, ...]] = ("preference",)

    beta: float = Field(default=0.1, gt=0)
    """How strongly the model is held to the reference."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """The assumed share of pairs whose labels are swapped."""


class OrpoConfig(ObjectiveConfig):
    """The ORPO loss."""

    schemas: ClassVar[tuple[Schema, ...]] = ("preference",)

    beta: float = Field(default=0.1, gt=0)
    """The weight of the odds ratio beside the loss of the chosen answers (lambda in the paper)."""
