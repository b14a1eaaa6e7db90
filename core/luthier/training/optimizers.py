"""What optimizers share: parameters in groups, and the schedule of the learning rate."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers.optimization import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from luthier.api.training import Schedule

UNDECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""Parameters without weight decay, by patterns for their names: as transformers' Trainer has it."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters: matrices with weight decay; norms and biases without."""
    decayed = set(get_parameter_names(model, [nn.LayerNorm], UNDECAYED))
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [item for name, item in trained if name in decayed], "weight_decay": weight_decay},
        {"params": [item for name, item in trained if name not in decayed], "weight_decay": 0.0},
    ]


def scheduler_of(optimizer: Optimizer, schedule: Schedule) -> LRScheduler:
    """The learning rate step by step: it rises from 0 over the warm-up, and falls as the schedule says."""
    name = "constant_with_warmup" if schedule.shape == "constant" and schedule.warmup_steps else schedule.shape
    return get_scheduler(name, optimizer, num_warmup_steps=schedule.warmup_steps, num_training_steps=schedule.steps)
