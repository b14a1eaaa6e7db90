"""Copies weights tensor by tensor into shards, in another dtype when asked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from luthier.api import ModelError
from luthier.artifacts.models import TensorHeader, tensor_headers
from safetensors import safe_open
from safetensors.torch import save_file

INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")


def write_weights(source: Path, out: Path, dtype: torch.dtype | None, shard_size: int) -> Iterator[tuple[int, int]]:
    """Write all tensors, yielding how many are done, and their number.

    Args:
        dtype: What floats become; None: nothing else.
        shard_size: The largest size of a file in bytes, unless one tensor is larger.

    Raises:
        ModelError: a weight is not finite, or does not fit into the dtype.
    """
    headers = tensor_headers(source)
    shards = _shards(headers, dtype, shard_size)
    names = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]  # fmt: skip
    done = 0
    total = 0
    with ExitStack() as stack:
        files = {name: stack.enter_context(safe_open(source / name, framework="pt"))
                 for name in sorted({header.file for header in headers.values()})}  # fmt: skip
        for file, shard in zip(names, shards, strict=True):
            tensors: dict[str, torch.Tensor] = {}
            for name in shard:
                tensors[name] = _stored(files[headers[name].file].get_tensor(name), dtype, name)
                total += tensors[name].nbytes
                done += 1
                yield done, len(headers)
            save_file(tensors, out / file, metadata={"format": "pt"})
    if len(shards) > 1:
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(headers: Mapping[str, TensorHeader], dtype: torch.dtype | None, limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, header in headers.items():
        width = dtype.itemsize if dtype is not None and header.dtype in FLOATS else _width(header)
        mine = width * torch.Size(header.shape).numel()
        if shards[-1] and size + mine > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += mine
    return shards


def _width(header: TensorHeader) -> int:
    return {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}.get(header.dtype, 1)


def _stored(tensor: torch.Tensor, dtype: torch.dtype | None, name: str) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    if not bool(torch.isfinite(tensor).all()):
        raise ModelError("the tensor has NaN or infinite values", where=name,
                         hint="train again with a lower learning rate, or take an earlier checkpoint")  # fmt: skip
    if dtype is None or tensor.dtype == dtype:
        return tensor
    stored = tensor.to(dtype)
    if not bool(torch.isfinite(stored).all()):
        largest = float(tensor.abs().max())
        raise ModelError(f"a weight of {largest:.3g} does not fit into {str(dtype).removeprefix('torch.')}", where=name,
                         hint="store the model as bfloat16 or float32")  # fmt: skip
    return stored
