"""The objective ``simpo``."""

from __future__ import annotations

from typing import ClassVar

from luthier.api import CompletionBatch, LossResult, Objective, Unit
from luthier_plugins.objectives.config import SimpoConfig
from torch.nn.functional import logsigmoid


class Simpo(Objective[SimpoConfig]):
    """-log sigmoid(beta * (mean log p(chosen) - mean log p(rejected)) - gamma) (Meng et al. 2024, arXiv:2405.14734,
    equation 6)."""

    unit: ClassVar[Unit] = "pair"

    def loss(self, batch: CompletionBatch) -> LossResult:
        chosen, rejected = batch.sides(batch.sums / batch.lengths)
        margin = self.config.beta * (chosen - rejected) - self.config.gamma
        logs = {"logps/chosen": chosen, "logps/rejected": rejected, "accuracy": (chosen > rejected).float()}
        return LossResult(-logsigmoid(margin), {**logs, "margin": margin})
