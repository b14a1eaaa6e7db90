"""The objective ``kto``."""

from __future__ import annotations

from typing import ClassVar

import torch
from luthier.api import CompletionBatch, Context, LossResult, Objective, Unit
from luthier.api.training import Need
from luthier_plugins.objectives.config import KtoConfig


class Kto(Objective[KtoConfig]):
    """1 - sigmoid(beta * (r - z)) of a good answer, 1 - sigmoid(beta * (z - r)) of a bad one, where r is its log-ratio
    of policy and reference, and z how far the policy has moved: the mean log-ratio of answers to other prompts, not
    below 0 (Ethayarajh et al. 2024, arXiv:2402.01306, equation 7). Without z it is APO-zero for answers that are no
    pairs (D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 7)."""

    unit: ClassVar[Unit] = "completion"

    def __init__(self, config: KtoConfig, context: Context) -> None:
        super().__init__(config, context)
        needs: set[Need] = {"reference", "mismatched"} if config.loss == "kto" else {"reference"}
        self.needs = frozenset(needs)

    def loss(self, batch: CompletionBatch) -> LossResult:
        assert batch.reference_sums is not None, "it needs the reference"
        assert batch.desirable is not None, "it reads rows of the schema `labelled`"
        good = batch.desirable
        ratio = batch.sums - batch.reference_sums
        moved = ratio.new_zeros(()) if batch.mismatch is None else batch.mismatch.clamp(min=0)
        signed = torch.where(good, ratio - moved, moved - ratio)
        weights = torch.where(good, self.config.desirable_weight, self.config.undesirable_weight)
        rewards = self.config.beta * ratio
        logs = {
            "rewards": rewards,
            "accuracy": ((ratio > moved) == good).float(),
            **({"kl": moved} if self.config.loss == "kto" else {}),
        }
        return LossResult(weights * (1 - (self.config.beta * signed).sigmoid()), logs)
