"""The optimizer ``adafactor``."""

from __future__ import annotations

import torch
from luthier.api import Optimizer, Schedule
from luthier.training.optimizers import parameter_groups, scheduler_of
from luthier_plugins.optimizers.config import AdafactorConfig
from torch import nn
from torch.optim.lr_scheduler import LRScheduler


class Adafactor(Optimizer[AdafactorConfig]):
    """Second moments by rows and columns (Shazeer and Stern 2018, arXiv:1804.04235), torch's."""

    def make(self, model: nn.Module, schedule: Schedule) -> tuple[torch.optim.Optimizer, LRScheduler]:
        optimizer = torch.optim.Adafactor(
            parameter_groups(model, schedule),
            lr=schedule.learning_rate,
            beta2_decay=self.config.beta2_decay,
            d=self.config.clipping,
        )
        return optimizer, scheduler_of(optimizer, schedule)
