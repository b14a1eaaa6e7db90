"""The config of the local executor."""

from __future__ import annotations

from luthier.api import Config, Field
from pydantic import model_validator


class LocalConfig(Config):
    """Workers on this machine, by default one that uses all it has."""

    slots: int = Field(default=1, gt=0)
    """How many stages may run side by side on the CPU; they share cores and memory. See `gpus` for GPUs."""
    gpus: list[list[int]] | None = None
    """The numbers of the GPUs of each slot, such as ``[[0], [1, 2]]``; by default one slot has all of them."""

    @model_validator(mode="after")
    def _one_way(self) -> LocalConfig:
        if self.gpus is not None and self.slots != 1:
            raise ValueError("`gpus` says how many slots there are: leave `slots` out")
        return self
