"""Weights with few bits as AutoAWQ, GPTQ, compressed-tensors and torchao lay them out: packed, and back.

A matrix of shape (rows, columns) is rows = outputs, columns = inputs, as in ``nn.Linear``. A group is so many columns
of one row that share a scale and a zero point: w = (q - zero) * scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from luthier.api.errors import ModelError
from luthier.artifacts.json_files import read_json
from luthier.artifacts.tensors import tensor_headers

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight rows is in each nibble of AutoAWQ's integers, from the lowest."""
WORD = 32
READABLE = ("awq", "gptq", "compressed-tensors", "torchao")
"""What ``quant_method`` may be in the config of a folder that `read_floats` reads."""
SCALED = {"weight": "weight_scale", "_weight_qdata": "_weight_scale"}
"""How compressed-tensors and torchao call a layer's values, and their scales."""
BESIDE = ("qzeros", "scales", "g_idx", *SCALED.values(), "_weight_zero_point")
"""Parts of a layer that are read with its values."""


@dataclass(frozen=True, slots=True)
class Grouped:
    """A matrix in whole numbers.

    Attributes:
        values: From 0 to 2^bits - 1, int32, shape (rows, columns).
        scales: float16, shape (rows, groups).
        zeros: int32, shape (rows, groups).
        bits: Bits of a value.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int

    @property
    def group_size(self) -> int:
        return self.values.shape[1] // self.scales.shape[1]

    def floats(self) -> Tensor:
        """What it stands for: float32, shape (rows, columns)."""
        rows, columns = self.values.shape
        whole = self.values.view(rows, -1, self.group_size) - self.zeros[:, :, None]
        return (whole.float() * self.scales.float()[:, :, None]).view(rows, columns)


def _packed(values: Tensor, bits: int, order: Sequence[int]) -> Tensor:
    """Whole numbers side by side in the last dimension, packed into int32."""
    several = WORD // bits
    parts = values.reshape(*values.shape[:-1], -1, several).long()
    word = torch.zeros(parts.shape[:-1], dtype=torch.int64)
    for place, which in enumerate(order):
        word |= parts[..., which] << (bits * place)
    # The highest value sets the sign.
    return torch.where(word >= 1 << (WORD - 1), word - (1 << WORD), word).int()


def _unpacked(words: Tensor, bits: int, order: Sequence[int]) -> Tensor:
    """The whole numbers of `_packed`, int32."""
    mask = (1 << bits) - 1
    parts = torch.empty(*words.shape, WORD // bits, dtype=torch.int32)
    for place, which in enumerate(order):
        parts[..., which] = (words >> (bits * place)) & mask
    return parts.reshape(*words.shape[:-1], -1)


def to_awq(matrix: Grouped) -> dict[str, Tensor]:
    """The tensors of AutoAWQ's ``gemm`` layout: ``qweight`` (columns, rows / 8), ``qzeros``, ``scales``."""
    return {
        "qweight": _packed(matrix.values.T, matrix.bits, AWQ_ORDER).contiguous(),
        "qzeros": _packed(matrix.zeros.T, matrix.bits, AWQ_ORDER).contiguous(),
        "scales": matrix.scales.T.contiguous(),
    }


def from_awq(tensors: Mapping[str, Tensor], bits: int) -> Grouped:
    """A matrix from AutoAWQ's layout."""
    return Grouped(
        _unpacked(tensors["qweight"], bits, AWQ_ORDER).T.contiguous(),
        tensors["scales"].T.contiguous(),
        _unpacked(tensors["qzeros"], bits, AWQ_ORDER).T.contiguous(),
        bits,
    )


def to_gptq(matrix: Grouped) -> dict[str, Tensor]:
    """The tensors of GPTQ's layout, version 1, which stores zero points minus one: ``qweight``
    (columns * bits / 32, rows), ``qzeros``, ``scales``, ``g_idx``.
    """
    order = range(WORD // matrix.bits)
    columns = torch.arange(matrix.values.shape[1], dtype=torch.int32)
    return {
        "qweight": _packed(matrix.values, matrix.bits, order).T.contiguous(),
        "qzeros": _packed((matrix.zeros - 1).T & ((1 << matrix.bits) - 1), matrix.bits, order).contiguous(),
        "scales": matrix.scales.T.contiguous(),
        "g_idx": columns // matrix.group_size,
    }


def from_gptq(tensors: Mapping[str, Tensor], bits: int) -> Grouped:
    """A matrix from GPTQ's layout, version 1.

    Raises:
        ModelError: its columns are reordered.
    """
    order = range(WORD // bits)
    values = _unpacked(tensors["qweight"].T.contiguous(), bits, order)
    scales = tensors["scales"].T.contiguous()
    size = values.shape[1] // scales.shape[1]
    if "g_idx" in tensors and not torch.equal(
        tensors["g_idx"], torch.arange(values.shape[1], dtype=torch.int32) // size
    ):
        raise ModelError("a GPTQ model whose columns were reordered (desc_act) cannot be read")
    zeros = _unpacked(tensors["qzeros"], bits, order).T.contiguous() + 1
    return Grouped(values, scales, zeros & ((1 << bits) - 1), bits)


def read_floats(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All weights of a model folder in float32, quantized ones as what they stand for.

    Raises:
        ModelError: the folder is quantized in a way that is not known here.
    """
    config: dict[str, Any] = read_json(folder / "config.json").get("quantization_config") or {}
    method = config.get("quant_method")
    if method is not None and method not in READABLE:
        raise ModelError(f"weights quantized with {method} cannot be read here", where=str(folder))
    headers = tensor_headers(folder)
    opened = {name: safe_open(folder / name, framework="pt") for name in {item.file for item in headers.values()}}

    def tensor(name: str) -> Tensor:
        file: Any = opened[headers[name].file]
        return file.get_tensor(name)

    for name in headers:
        stem, _, last = name.rpartition(".")
        if last == "qweight":
            parts = {
                part: tensor(f"{stem}.{part}")
                for part in ("qweight", "qzeros", "scales", "g_idx")
                if f"{stem}.{part}" in headers
            }
            read = from_awq if method == "awq" else from_gptq
            yield f"{stem}.weight", read(parts, config["bits"]).floats()
        elif f"{stem}.{SCALED.get(last)}" in headers:
            scale = tensor(f"{stem}.{SCALED[last]}").float()
            if scale.shape[1:] != (1,):
                raise ModelError("has scales for groups of inputs, which cannot be read here", where=stem)
            zero = tensor(f"{stem}._weight_zero_point").float() if f"{stem}._weight_zero_point" in headers else 0.0
            yield f"{stem}.weight", (tensor(name).float() - zero) * scale
        elif last not in BESIDE:
            yield name, tensor(name).float()
