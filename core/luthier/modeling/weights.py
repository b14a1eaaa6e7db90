"""Copies weights tensor by tensor, in another dtype when asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from luthier.api import ModelError
from luthier.artifacts.tensors import model_tensors
from luthier.modeling.shards import ShardWriter, tensors_of


def write_weights(source: Path, out: Path, dtype: torch.dtype | None, shard_size: int) -> Iterator[tuple[int, int]]:
    """Write all parameters, yielding how many are done, and their number.

    Args:
        dtype: What floats become; None: nothing else.
        shard_size: The largest size of a file in bytes, unless one tensor is larger.

    Raises:
        ModelError: a weight is not finite, or does not fit into the dtype.
    """
    count = len(model_tensors(source))
    writer = ShardWriter(out, shard_size)
    for done, (name, tensor) in enumerate(tensors_of(source), 1):
        writer.add(name, _stored(tensor, dtype, name))
        yield done, count
    writer.close()


def _stored(tensor: torch.Tensor, dtype: torch.dtype | None, name: str) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    if not bool(torch.isfinite(tensor).all()):
        raise ModelError(
            "the tensor has NaN or infinite values",
            where=name,
            hint="train again with a lower learning rate, or take an earlier checkpoint",
        )
    if dtype is None or tensor.dtype == dtype:
        return tensor
    stored = tensor.to(dtype)
    if not bool(torch.isfinite(stored).all()):
        largest = float(tensor.abs().max())
        raise ModelError(
            f"a weight of {largest:.3g} does not fit into {str(dtype).removeprefix('torch.')}",
            where=name,
            hint="store the model as bfloat16 or float32",
        )
    return stored
