"""Keeps activations in the computer's memory from forward to backward, where a GPU's is short."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

SMALLEST = 1 << 16
"""Values of the smallest tensor that is moved: smaller ones take longer to move than they are worth."""


@contextmanager
def offloaded(model: nn.Module, *, smallest: int = SMALLEST) -> Iterator[None]:
    """While it is entered, what autograd keeps for the backward pass lies in pinned memory of the computer.

    Weights stay where they are. With `gradient_checkpointing` what is kept are the inputs of blocks.

    Args:
        model: The model.
        smallest: Tensors with fewer values stay where they are as well.
    """
    weights = {item.untyped_storage().data_ptr() for item in model.parameters()}

    def pack(tensor: Tensor) -> Any:
        if tensor.numel() < smallest or tensor.untyped_storage().data_ptr() in weights:
            return tensor
        there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        there.copy_(tensor, non_blocking=tensor.is_cuda)
        return tensor.device, there

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, there = packed
        return there.to(device, non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
