"""The regularizer ``l2sp``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from luthier.api import CompletionBatch, Regularizer, TokenBatch
from luthier.training.moves import weights_of
from luthier_plugins.regularizers.config import L2spConfig
from torch import Tensor, nn


class L2sp(Regularizer[L2spConfig]):
    """strength / 2 * |w - w0|^2 (Li et al. 2018, arXiv:1802.01483); of a low-rank adapter w is what it adds to the
    weights, B A."""

    def start(self, model: nn.Module, batches: Callable[[], Iterator[TokenBatch]]) -> None:
        self._weights = list(weights_of(model).values())

    def penalty(self, model: nn.Module, batch: TokenBatch, outputs: CompletionBatch) -> Tensor:
        return 0.5 * self.config.strength * torch.stack([weight.squared() for weight in self._weights]).sum()
