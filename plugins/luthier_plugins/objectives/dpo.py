"""The objective ``dpo``, in all its forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from luthier.api import CompletionBatch, LossResult, Objective, Unit
from luthier.api.training import Need
from luthier_plugins.objectives.config import DpoConfig
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True, slots=True)
class Sides:
    """The chosen and the rejected answers of pairs, each tensor of shape (pairs,).

    Attributes:
        chosen: The log-ratio of policy and reference of each chosen answer, ...
        rejected: ... and of each rejected one.
        margin: The difference of their scores: of log-ratios, as the divergence turns them, by token if lengths are
            normalized.
        by_token: The same, always by token.
        nll: The mean -log p of the chosen answers' tokens.
    """

    chosen: Tensor
    rejected: Tensor
    margin: Tensor
    by_token: Tensor
    nll: Tensor


Loss = Callable[[Sides, DpoConfig], Tensor]
"""One loss for each pair."""


def sigmoid(sides: Sides, config: DpoConfig) -> Tensor:
    """Rafailov et al. 2023 (arXiv:2305.18290), equation 7; smoothed as in Mitchell 2023 (conservative DPO)."""
    smoothing, margin = config.label_smoothing, config.beta * sides.margin
    return -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)


def hinge(sides: Sides, config: DpoConfig) -> Tensor:
    """Zhao et al. 2023 (SLiC, arXiv:2305.10425), with DPO's margin."""
    return torch.relu(1 - config.beta * sides.margin)


def ipo(sides: Sides, config: DpoConfig) -> Tensor:
    """Azar et al. 2023 (arXiv:2310.12036), equation 17; by token, so that long answers do not weigh more."""
    return (sides.by_token - 1 / (2 * config.beta)) ** 2


def robust(sides: Sides, config: DpoConfig) -> Tensor:
    """Chowdhury et al. 2024 (arXiv:2403.00409), equation 12: unbiased where a share of the labels is swapped."""
    smoothing, margin = config.label_smoothing, config.beta * sides.margin
    return (-(1 - smoothing) * logsigmoid(margin) + smoothing * logsigmoid(-margin)) / (1 - 2 * smoothing)


def exo(sides: Sides, config: DpoConfig) -> Tensor:
    """Ji et al. 2024 (arXiv:2402.00856), equation 16: the KL divergence of the policy's preference from the label's,
    the latter smoothed."""
    smoothing, margin = config.label_smoothing or EXO_SMOOTHING, config.beta * sides.margin
    for_chosen = margin.sigmoid() * (logsigmoid(margin) - math.log1p(-smoothing))
    return for_chosen + (-margin).sigmoid() * (logsigmoid(-margin) - math.log(smoothing))


def nca(sides: Sides, config: DpoConfig) -> Tensor:
    """Chen et al. 2024 (arXiv:2402.05369), equation 11, for pairs: likelihoods themselves are held up."""
    chosen, rejected = config.beta * sides.chosen, config.beta * sides.rejected
    return -logsigmoid(chosen) - 0.5 * (logsigmoid(-chosen) + logsigmoid(-rejected))


def sppo(sides: Sides, config: DpoConfig) -> Tensor:
    """Wu et al. 2024 (arXiv:2405.00675), equation 4.7, with a chosen answer that always wins."""
    target = 1 / (2 * config.beta)
    return (sides.chosen - target) ** 2 + (sides.rejected + target) ** 2


def apo_zero(sides: Sides, config: DpoConfig) -> Tensor:
    """D'Oosterlinck et al. 2024 (arXiv:2408.06266), equation 7: chosen answers that are better than the model's own."""
    return 1 - (config.beta * sides.chosen).sigmoid() + (config.beta * sides.rejected).sigmoid()


def apo_down(sides: Sides, config: DpoConfig) -> Tensor:
    """D'Oosterlinck et al. 2024 (arXiv:2408.06266), equation 8: chosen answers that are worse than the model's own."""
    margin = sides.chosen - sides.rejected
    return (config.beta * sides.chosen).sigmoid() + 1 - (config.beta * margin).sigmoid()


def discopop(sides: Sides, config: DpoConfig) -> Tensor:
    """Lu et al. 2024 (arXiv:2406.08414), equation 5: logistic and exponential loss, blended by the margin."""
    margin = config.beta * sides.margin
    blend = (margin / config.discopop_tau).sigmoid()
    return (1 - blend) * -logsigmoid(margin) + blend * (-margin).exp()


def nll(sides: Sides, config: DpoConfig) -> Tensor:
    """-log p of the chosen answer, by token: beside another loss it keeps the model saying it (Pang et al. 2024,
    arXiv:2404.19733, equation 1)."""
    return sides.nll


EXO_SMOOTHING = 1e-3
"""Without any, the loss of a wrong preference would be infinite (Ji et al. 2024, appendix)."""
LOSSES: Mapping[str, Loss] = {
    "sigmoid": sigmoid, "hinge": hinge, "ipo": ipo, "robust": robust, "exo": exo, "nca": nca, "sppo": sppo,
    "apo_zero": apo_zero, "apo_down": apo_down, "discopop": discopop, "nll": nll,
}  # fmt: skip
"""By the names that recipes use."""


class Dpo(Objective[DpoConfig]):
    """Preference optimization against the reference: a weighted sum of the losses that its config names."""

    unit: ClassVar[Unit] = "pair"
    needs: frozenset[Need] = frozenset({"reference"})

    def loss(self, batch: CompletionBatch) -> LossResult:
        assert batch.reference_sums is not None, "it needs the reference"
        sums, lengths = batch.sides(batch.sums), batch.sides(batch.lengths)
        before = batch.sides(batch.reference_sums)
        chosen, rejected = (now - then for now, then in zip(sums, before, strict=True))
        scores = [self._score(ratio) for ratio in (chosen, rejected)]
        by_token = scores[0] / lengths[0] - scores[1] / lengths[1]
        margin = by_token if self.config.length_normalized else scores[0] - scores[1]
        sides = Sides(chosen, rejected, margin, by_token, -sums[0] / lengths[0])
        weights: dict[str, float] = {**self.config.losses}
        parts = {name: LOSSES[name](sides, self.config) for name in weights}
        losses = torch.stack([weights[name] * part for name, part in parts.items()]).sum(0)
        logs = {
            "logps/chosen": sums[0],
            "logps/rejected": sums[1],
            "rewards/chosen": self.config.beta * chosen,
            "rewards/rejected": self.config.beta * rejected,
            "accuracy": (margin > 0).float(),
            "margin": margin,
        }
        return LossResult(losses, {**logs, **({f"loss/{k}": v for k, v in parts.items()} if len(parts) > 1 else {})})

    def _score(self, ratio: Tensor) -> Tensor:
        """f'(pi / reference) for log(pi / reference), f being the divergence (Wang et al. 2023, arXiv:2309.16240,
        table 2), up to constants that the difference of two scores loses."""
        divergence, alpha = self.config.divergence, self.config.divergence_alpha
        if divergence == "forward_kl":
            return -(-ratio).exp()
        if divergence == "js":
            return logsigmoid(ratio)
        if divergence == "alpha":
            return -torch.expm1(-alpha * ratio) / alpha
        return ratio
