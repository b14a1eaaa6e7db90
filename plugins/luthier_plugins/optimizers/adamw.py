"""The optimizer ``adamw``."""

from __future__ import annotations

import torch
from luthier.api import Optimizer, Schedule
from luthier.training.optimizers import parameter_groups, scheduler_of
from luthier_plugins.optimizers.config import AdamwConfig
from torch import nn
from torch.optim.lr_scheduler import LRScheduler


class Adamw(Optimizer[AdamwConfig]):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), torch's fused kernels."""

    def make(self, model: nn.Module, schedule: Schedule) -> tuple[torch.optim.Optimizer, LRScheduler]:
        groups = parameter_groups(model, schedule.weight_decay)
        betas = (self.config.beta1, self.config.beta2)
        optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=betas, eps=self.config.eps, fused=True)
        return optimizer, scheduler_of(optimizer, schedule)
