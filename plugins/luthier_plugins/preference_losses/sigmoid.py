"""The DPO loss."""

from __future__ import annotations

from typing import ClassVar

from luthier.api import PreferenceBatch
from luthier_plugins.preference_losses.config import SigmoidConfig
from torch import Tensor
from torch.nn.functional import logsigmoid


class Sigmoid:
    """-log sigmoid(beta * margin), the margin of log-ratios to the reference (Rafailov et al. 2023,
    arXiv:2305.18290, equation 7); smoothed as in Mitchell 2023 (conservative DPO)."""

    needs_reference: ClassVar[bool] = True

    def __init__(self, config: SigmoidConfig) -> None:
        self.smoothing = config.label_smoothing

    def loss(self, batch: PreferenceBatch, beta: float) -> Tensor:
        assert batch.reference_chosen is not None, "the stage computes the reference"
        assert batch.reference_rejected is not None, "the stage computes the reference"
        margin = (batch.chosen - batch.reference_chosen) - (batch.rejected - batch.reference_rejected)
        right, wrong = logsigmoid(beta * margin), logsigmoid(-beta * margin)
        return -(1 - self.smoothing) * right - self.smoothing * wrong
