"""How much arithmetic training is, and what share of a GPU's it keeps busy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from luthier.training.encoding import EncodedRow

DENSE_BF16 = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Products and sums a second of dense bf16 matrices that are added up in float32, from NVIDIA's data sheets; the first
name that a GPU's has in it counts."""


class Arithmetic:
    """Counts what training needs of a model; what is computed twice to save memory does not count twice.

    A pass forward takes two operations for each weight of a matrix and token (Kaplan et al., arXiv:2001.08361); back,
    as many for the gradients of activations, and as many for those of weights where these are trained. The output head
    counts where it is applied, and attention by the pairs of tokens that see each other.

    Args:
        model: The model that is trained.
    """

    def __init__(self, model: nn.Module) -> None:
        inside: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        text = inside.config.get_text_config()
        head = inside.get_output_embeddings()
        known = {id(module) for module in head.modules()} if head is not None else set()
        self._body = _forward_and_back(module for module in inside.modules() if id(module) not in known)
        names = ("num_local_experts", "num_experts", "n_routed_experts")
        experts = next((value for name in names if (value := getattr(text, name, None))), 1)
        active = (getattr(text, "num_experts_per_tok", None) or 1) / experts
        fused = [value for value in inside.parameters() if value.ndim == 3]
        self._body += active * sum((6 if value.requires_grad else 4) * value.numel() for value in fused)
        self._head = 0.0 if head is None else _forward_and_back(head.modules())
        # Models of state spaces have no heads, and no pairs.
        heads = getattr(text, "num_attention_heads", None) or 0
        width = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
        # Scores and values, two operations each, of half of all pairs; forward, and twice that back.
        self._pair = 3 * 2 * text.num_hidden_layers * heads * width

    def of(self, rows: Sequence[EncodedRow]) -> float:
        """Operations that the gradients of some rows take."""
        total = 0.0
        for row in rows:
            for item in row.completions:
                lengths = item.lengths or (len(item.input_ids),)
                total += len(item.input_ids) * self._body + self._pair * sum(length**2 for length in lengths)
            total += row.targets * self._head
        return total


def _forward_and_back(modules: Any) -> float:
    found = 0.0
    for module in modules:
        if isinstance(module, nn.Linear):
            # Not by the size of the weight: quantized ones are stored otherwise.
            size = module.in_features * module.out_features
            found += (6 if module.weight.requires_grad else 4) * size
    return found


def most_of(device: torch.device) -> float | None:
    """Operations a second that a GPU is sold with; None where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((value for part, value in DENSE_BF16.items() if part in name), None)
