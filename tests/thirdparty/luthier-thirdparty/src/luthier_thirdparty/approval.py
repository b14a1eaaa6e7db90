"""An objective on labelled answers (Ethayarajh et al. 2024, arXiv:2402.01306, with z0 = 0)."""

from typing import ClassVar

import torch
from luthier.api import CompletionBatch, LossResult, Objective, Unit
from luthier.api.training import Need

from luthier_thirdparty.config import ApprovalConfig


class Approval(Objective[ApprovalConfig]):
    """1 - sigmoid(+-beta * log-ratio), weighted."""

    unit: ClassVar[Unit] = "completion"
    needs: frozenset[Need] = frozenset({"reference"})

    def loss(self, batch: CompletionBatch) -> LossResult:
        assert batch.reference_sums is not None
        assert batch.desirable is not None
        ratio = batch.sums - batch.reference_sums
        good = 1 - torch.sigmoid(self.config.beta * ratio)
        bad = self.config.undesirable * (1 - torch.sigmoid(-self.config.beta * ratio))
        return LossResult(torch.where(batch.desirable, good, bad), {"ratio": ratio})
