"""The objective ``cpo``."""

from __future__ import annotations

from typing import ClassVar

from luthier.api import CompletionBatch, LossResult, Objective, Unit
from luthier_plugins.objectives.config import CpoConfig
from torch.nn.functional import logsigmoid


class Cpo(Objective[CpoConfig]):
    """-log sigmoid(beta * (log p(chosen) - log p(rejected))) - alpha * mean log p(chosen) (Xu et al. 2024,
    arXiv:2401.08417, equations 5 and 6)."""

    unit: ClassVar[Unit] = "pair"

    def loss(self, batch: CompletionBatch) -> LossResult:
        chosen, rejected = batch.sides(batch.sums)
        length, _ = batch.sides(batch.lengths)
        smoothing, margin = self.config.label_smoothing, self.config.beta * (chosen - rejected)
        preference = -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)
        losses = preference - self.config.alpha * chosen / length
        logs = {"logps/chosen": chosen, "logps/rejected": rejected, "accuracy": (margin > 0).float(), "margin": margin}
        return LossResult(losses, {**logs, "loss/preference": preference})
