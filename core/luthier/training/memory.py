"""How much fits into memory at a time."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from luthier.api.context import Context
from luthier.api.tuning import TrainingConfig
from luthier.modeling.precision import Precision
from luthier.training.passes import Limits

AT_MOST = 8192
"""Tokens of a pass on a CPU: more do not make it faster."""
SHARE = 0.5
"""Of the memory that is free, what activations may take."""


def limits_of(config: TrainingConfig, model: Any, context: Context, precision: Precision) -> Limits:
    """How much a pass takes at the beginning; it becomes less where that does not fit."""
    if isinstance(config.micro_batch_size, int):
        return Limits(None, config.micro_batch_size)
    if context.device != "cpu":
        return Limits()
    free = psutil.virtual_memory().available * SHARE
    return Limits(max(1, min(AT_MOST, int(free / activation_bytes(model, precision)))), None)


def fits(model: Any, longest: int, context: Context, precision: Precision) -> bool:
    """Whether the activations of the longest row are likely to fit."""
    free = psutil.virtual_memory().available if context.device == "cpu" else torch.cuda.mem_get_info()[0]
    return longest * activation_bytes(model, precision) < free * SHARE


def activation_bytes(model: Any, precision: Precision) -> int:
    """About how many bytes a token takes from its forward to its backward pass."""
    text = model.config.get_text_config()
    width = text.hidden_size
    inner = getattr(text, "intermediate_size", None) or 4 * width
    inner = max(inner) if isinstance(inner, (list, tuple)) else inner
    return (2 if precision == "bf16" else 4) * text.num_hidden_layers * (16 * width + 5 * inner)
