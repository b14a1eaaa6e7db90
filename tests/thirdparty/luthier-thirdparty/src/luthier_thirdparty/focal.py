"""An objective that weights tokens (Lin et al. 2017, arXiv:1708.02002)."""

from typing import ClassVar

from luthier.api import CompletionBatch, LossResult, Objective, Unit

from luthier_thirdparty.config import FocalConfig


class Focal(Objective[FocalConfig]):
    """-(1 - p) ** gamma * log p of each trained token."""

    unit: ClassVar[Unit] = "token"

    def loss(self, batch: CompletionBatch) -> LossResult:
        weights = (1 - batch.logps.detach().exp()) ** self.config.gamma
        return LossResult(-weights * batch.logps, {"weight": weights})
