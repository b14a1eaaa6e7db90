"""The optimizer ``lion``."""

from __future__ import annotations

import bitsandbytes.optim.lion as bitsandbytes
import torch
from luthier.api import Optimizer, Schedule
from luthier.training.optimizers import parameter_groups, scheduler_of
from luthier_plugins.optimizers.config import LionConfig
from torch import nn
from torch.optim.lr_scheduler import LRScheduler


class Lion(Optimizer[LionConfig]):
    """The sign of the momentum (Chen et al. 2023, arXiv:2302.06675), bitsandbytes' kernels."""

    def make(self, model: nn.Module, schedule: Schedule) -> tuple[torch.optim.Optimizer, LRScheduler]:
        optimizer = bitsandbytes.Lion(
            parameter_groups(model, schedule),
            lr=schedule.learning_rate,
            betas=(self.config.beta1, self.config.beta2),
        )
        return optimizer, scheduler_of(optimizer, schedule)
