"""The optimizer ``muon``."""

from __future__ import annotations

from typing import Any

import torch
from luthier.api import Optimizer, Schedule
from luthier.training.optimizers import Together, parameter_groups, scheduler_of
from luthier_plugins.optimizers.config import MuonConfig
from torch import nn
from torch.optim.lr_scheduler import LRScheduler


class Muon(Optimizer[MuonConfig]):
    """Momentum made orthogonal (Jordan 2024, https://kellerjordan.github.io/posts/muon), its size matched to AdamW's
    (Liu et al. 2025, arXiv:2502.16982), torch's; embeddings, output heads and everything that is no matrix follow
    AdamW."""

    def make(self, model: nn.Module, schedule: Schedule) -> tuple[torch.optim.Optimizer, LRScheduler]:
        embeddings = {
            id(parameter)
            for module in (_embeddings(model, "get_input_embeddings"), _embeddings(model, "get_output_embeddings"))
            if module is not None
            for parameter in module.parameters()
        }
        by_muon: list[dict[str, Any]] = []
        by_adamw: list[dict[str, Any]] = []
        for group in parameter_groups(model, schedule):
            matrices = [item for item in group["params"] if item.ndim == 2 and id(item) not in embeddings]
            others = [item for item in group["params"] if item.ndim != 2 or id(item) in embeddings]
            by_muon += [{**group, "params": matrices}] if matrices else []
            by_adamw += [{**group, "params": others}] if others else []
        made: list[torch.optim.Optimizer] = []
        if by_muon:
            made.append(
                torch.optim.Muon(
                    by_muon,
                    lr=schedule.learning_rate,
                    momentum=self.config.momentum,
                    nesterov=self.config.nesterov,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if by_adamw:
            betas = (self.config.beta1, self.config.beta2)
            made.append(torch.optim.AdamW(by_adamw, lr=schedule.learning_rate, betas=betas, eps=self.config.eps))
        optimizer = made[0] if len(made) == 1 else Together(made)
        return optimizer, scheduler_of(optimizer, schedule)


def _embeddings(model: Any, name: str) -> nn.Module | None:
    return getattr(model, name)() if hasattr(model, name) else None
