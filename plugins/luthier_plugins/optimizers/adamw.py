"""The optimizers ``adamw`` and ``adamw8bit``."""

from __future__ import annotations

import torch
from luthier.api import ModelError, Optimizer, Schedule
from luthier.training.optimizers import parameter_groups, scheduler_of
from luthier_plugins.optimizers.config import AdamwConfig
from torch import nn
from torch.optim.lr_scheduler import LRScheduler


class Adamw(Optimizer[AdamwConfig]):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), torch's fused kernels."""

    def make(self, model: nn.Module, schedule: Schedule) -> tuple[torch.optim.Optimizer, LRScheduler]:
        betas = (self.config.beta1, self.config.beta2)
        optimizer = torch.optim.AdamW(
            parameter_groups(model, schedule),
            lr=schedule.learning_rate,
            betas=betas,
            eps=self.config.eps,
            fused=True,
        )
        return optimizer, scheduler_of(optimizer, schedule)


class Adamw8bit(Optimizer[AdamwConfig]):
    """AdamW with its two moments in 8 bits by blocks (Dettmers et al. 2022, arXiv:2110.02861), bitsandbytes' kernels;
    tensors below 4,096 values keep theirs in 32 bits."""

    def make(self, model: nn.Module, schedule: Schedule) -> tuple[torch.optim.Optimizer, LRScheduler]:
        try:
            from bitsandbytes.optim.adamw import AdamW8bit
        # Without a library for this machine it fails while it is imported, in several ways.
        except (ImportError, RuntimeError, OSError) as error:
            raise ModelError(
                f"bitsandbytes has no 8-bit optimizer for this machine: {error}",
                hint="use the optimizer `adafactor` or `adamw`",
            ) from error
        optimizer = AdamW8bit(
            parameter_groups(model, schedule),
            lr=schedule.learning_rate,
            betas=(self.config.beta1, self.config.beta2),
            eps=self.config.eps,
        )
        return optimizer, scheduler_of(optimizer, schedule)
