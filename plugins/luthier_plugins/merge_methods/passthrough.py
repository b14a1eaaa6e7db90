"""One model's parameters as they are."""

from __future__ import annotations

from luthier.api import Context
from luthier.merging.api import Granularity, MergeMethod, MergePart
from luthier_plugins.merge_methods.config import PassthroughConfig
from torch import Tensor


class Passthrough(MergeMethod[PassthroughConfig]):
    """scale * theta: with slices, a stack of layers of several models."""

    granularity: Granularity = "elementwise"

    def __init__(self, config: PassthroughConfig, context: Context) -> None:
        super().__init__(config, context)
        self.scale = config.scale

    def merge(self, part: MergePart) -> Tensor:
        return part.tensors[0] * part.parameter.value(self.scale)
