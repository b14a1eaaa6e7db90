"""One model's parameters as they are."""

from __future__ import annotations

from typing import ClassVar

from luthier.merging.api import Granularity, MergePart
from luthier_plugins.merge_methods.config import PassthroughConfig
from torch import Tensor


class Passthrough:
    """scale * theta: with slices, a stack of layers of several models."""

    granularity: ClassVar[Granularity] = "elementwise"

    def __init__(self, config: PassthroughConfig) -> None:
        self.scale = config.scale

    def merge(self, part: MergePart) -> Tensor:
        return part.tensors[0] * part.place.value(self.scale)
