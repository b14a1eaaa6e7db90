"""What optimizers share: parameters in groups, and the schedule of the learning rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers.optimization import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from luthier.api.training import Schedule
from luthier.training.experts import rows_of

UNDECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""Parameters without weight decay, by patterns for their names: as transformers' Trainer has it."""


def parameter_groups(model: nn.Module, schedule: Schedule) -> list[dict[str, Any]]:
    """The trainable parameters: matrices with weight decay; norms and biases without, and those of which some rows are
    trained (see `luthier.training.experts.decay_rows`). Those whose learning rate is scaled are groups of their own.
    """
    decayed = set(get_parameter_names(model, [nn.LayerNorm], UNDECAYED))
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = name in decayed and rows_of(parameter) is None
            groups.setdefault((decays, schedule.scale(name)), []).append(parameter)
    return [
        {
            "params": items,
            "weight_decay": schedule.weight_decay if decays else 0.0,
            "lr": schedule.learning_rate * scale,
        }
        for (decays, scale), items in sorted(groups.items(), key=lambda item: (not item[0][0], item[0][1]))
    ]


def scheduler_of(optimizer: Optimizer, schedule: Schedule) -> LRScheduler:
    """The learning rate step by step: it rises from 0 over the warm-up, and falls as the schedule says."""
    name = "constant_with_warmup" if schedule.shape == "constant" and schedule.warmup_steps else schedule.shape
    if name == "wsd":
        # Warm-up, a stable phase, and a decay along a line (Hu et al. 2024, arXiv:2404.06395).
        return get_scheduler(
            "warmup_stable_decay",
            optimizer,
            num_warmup_steps=schedule.warmup_steps,
            num_training_steps=schedule.steps,
            scheduler_specific_kwargs={"num_decay_steps": schedule.decay_steps, "decay_type": "linear"},
        )
    return get_scheduler(name, optimizer, num_warmup_steps=schedule.warmup_steps, num_training_steps=schedule.steps)


class Together(Optimizer):
    """Several optimizers, each of its own parameters, as one.

    Args:
        parts: The optimizers.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        """The groups are those of the parts themselves: who sets a learning rate here, sets it there."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of each."""
        found = closure() if closure is not None else None
        for part in self.parts:
            part.step()
        return found

    def state_dict(self) -> dict[str, Any]:
        """Those of the parts, in their order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Each takes its own."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()
