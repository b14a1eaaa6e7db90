"""The configs of the merge methods."""

from __future__ import annotations

from typing import Any

from luthier.api import Config, Field


class LinearConfig(Config):
    """Weighted average."""

    normalize: bool = True
    """Divide by the sum of the weights."""


class SlerpConfig(Config):
    """Spherical interpolation."""

    t: float = Field(default=0.5, ge=0.0, le=1.0)
    """How far to go from the first model (0) to the second (1)."""


class TiesConfig(Config):
    """TIES merging."""

    density: float = Field(default=0.5, ge=0.0, le=1.0)
    """The share of each task vector's entries that is kept, the largest by magnitude."""
    normalize: bool = True
    """Divide by the sum of the weights that agree with the elected sign, entry by entry."""


class TaskArithmeticConfig(Config):
    """Adds up task vectors."""

    scale: float = 1.0
    """What the sum is multiplied with (lambda in the paper)."""


class ModelStockConfig(Config):
    """Nothing to choose: the angles between the task vectors decide."""


class MergekitConfig(Config):
    """A method of mergekit."""

    name: str = "linear"
    """Its name there, such as ``dare_ties``."""
    parameters: dict[str, Any] = {}
    """Its parameters, such as ``{density: 0.5}``."""
    seed: int = Field(default=0, ge=0)
    """The seed of methods with random masks."""
