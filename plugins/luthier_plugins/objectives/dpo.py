"""The objective ``dpo``."""

from __future__ import annotations

from typing import ClassVar

from luthier.api import CompletionBatch, LossResult, Objective, Unit
from luthier.api.training import Need
from luthier_plugins.objectives.config import DpoConfig
from torch.nn.functional import logsigmoid


class Dpo(Objective[DpoConfig]):
    """-log sigmoid(beta * margin), the margin of log-ratios to the reference (Rafailov et al. 2023,
    arXiv:2305.18290, equation 7); smoothed as in Mitchell 2023 (conservative DPO)."""

    unit: ClassVar[Unit] = "pair"
    needs: ClassVar[frozenset[Need]] = frozenset({"reference"})

    def loss(self, batch: CompletionBatch) -> LossResult:
        assert batch.reference_sums is not None, "it needs the reference"
        beta, smoothing = self.config.beta, self.config.label_smoothing
        chosen, rejected = batch.sides(batch.sums)
        before_chosen, before_rejected = batch.sides(batch.reference_sums)
        margin = (chosen - before_chosen) - (rejected - before_rejected)
        losses = -(1 - smoothing) * logsigmoid(beta * margin) - smoothing * logsigmoid(-beta * margin)
        return LossResult(
            losses,
            {"logps/chosen": chosen, "logps/rejected": rejected, "accuracy": (margin > 0).float(), "margin": margin},
        )
