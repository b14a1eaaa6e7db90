"""The objective ``orpo``."""

from __future__ import annotations

from typing import ClassVar

import torch
from luthier.api import CompletionBatch, LossResult, Objective, Unit
from luthier_plugins.objectives.config import OrpoConfig
from torch import Tensor
from torch.nn.functional import logsigmoid


class Orpo(Objective[OrpoConfig]):
    """-log p(chosen) - beta * log sigmoid(log odds ratio) (Hong et al. 2024, arXiv:2403.07691, equations 4 to 7).

    p is the geometric mean of a completion's token probabilities, and odds = p / (1 - p).
    """

    unit: ClassVar[Unit] = "pair"

    def loss(self, batch: CompletionBatch) -> LossResult:
        sums, lengths = batch.sides(batch.sums), batch.sides(batch.lengths)
        chosen, rejected = sums[0] / lengths[0], sums[1] / lengths[1]
        losses = -chosen - self.config.beta * logsigmoid(log_odds(chosen) - log_odds(rejected))
        # The odds rise with the probability: the likelier answer has the higher ones.
        logs = {"logps/chosen": sums[0], "logps/rejected": sums[1], "accuracy": (chosen > rejected).float()}
        return LossResult(losses, logs)


def log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)), accurate at both ends.

    Args:
        log_p: Log-probabilities, below 0.
    """
    # log(1 - exp(x)) loses its digits near 0 one way and far from 0 the other (Maechler 2012).
    near = torch.log(-torch.expm1(torch.clamp(log_p, min=-0.7, max=-1e-7)))
    far = torch.log1p(-torch.exp(torch.clamp(log_p, max=-0.6)))
    return log_p - torch.where(log_p > -0.693, near, far)
