"""An optimizer."""

import torch
from luthier.api import Optimizer, Schedule
from luthier.training.optimizers import parameter_groups, scheduler_of
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from luthier_thirdparty.config import MomentumConfig


class Momentum(Optimizer[MomentumConfig]):
    """torch's SGD."""

    def make(self, model: nn.Module, schedule: Schedule) -> tuple[torch.optim.Optimizer, LRScheduler]:
        groups = parameter_groups(model, schedule)
        optimizer = torch.optim.SGD(groups, lr=schedule.learning_rate, momentum=self.config.momentum)
        return optimizer, scheduler_of(optimizer, schedule)
