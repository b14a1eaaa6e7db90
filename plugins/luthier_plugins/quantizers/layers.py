"""Which weights get fewer bits."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from luthier.api import ModelError
from luthier.artifacts.tensors import TensorHeader

NUMBER = re.compile(r"\.layers\.(\d+)\.")
ROUTERS = ("gate", "router", "gating", "wg", "shared_expert_gate")
"""Parts of the names of what chooses experts: small, and a changed choice is another answer."""
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
EXPERT = re.compile(r"\.experts\.\d+\.")


def layers_of(headers: Mapping[str, TensorHeader], skip: Sequence[str]) -> list[str]:
    """The weights of all linear layers inside the model's layers, without those to skip.

    Raises:
        ModelError: a pattern to skip is found in no name, or nothing is left.
    """
    linear = [name for name in _matrices(headers) if not _is_router(name)]
    stacked = stacked_experts(headers)
    for pattern in skip:
        if any(re.search(pattern, name) for name in _matrices(headers) if _is_router(name)):
            # They are left as they are in any case.
            continue
        if not any(re.search(pattern, name) for name in [*linear, *stacked]):
            raise ModelError(
                f"`skip` has {pattern!r}, which matches no linear layer",
                hint=f"names are like {', '.join(linear[:3])}",
            )
    left = [name for name in stacked if not any(re.search(pattern, name) for pattern in skip)]
    if left:
        entries = sum(math.prod(headers[name].shape) for name in left)
        whole = sum(math.prod(header.shape) for header in headers.values())
        raise ModelError(
            f"the experts of a layer lie in one tensor of three dimensions ({left[0]} {list(headers[left[0]].shape)} "
            f"and {len(left) - 1} more), for which this layout has no form: {entries / whole:.0%} of the weights would "
            "stay as they are",
            hint="export GGUF, where llama.cpp knows the architecture; or leave them as they are, with a pattern for "
            "their names in `skip`",
        )
    chosen = [name for name in linear if not any(re.search(pattern, name) for pattern in skip)]
    _check_fused(linear, set(chosen))
    if not chosen:
        raise ModelError("no layer is left to quantize", hint="`skip` fewer of them")
    # safetensors has them in the order of their names, in which layer 10 comes before layer 2.
    return sorted(chosen, key=lambda name: int(NUMBER.findall(name)[0]))


def kept_of(headers: Mapping[str, TensorHeader], chosen: Sequence[str]) -> list[str]:
    """The matrices inside the model's layers that stay unchanged, routers among them: names of modules."""
    quantized = set(chosen)
    return [name.removesuffix(".weight") for name in _matrices(headers) if name not in quantized]


def _matrices(headers: Mapping[str, TensorHeader]) -> list[str]:
    """The weights inside the model's layers that inputs are multiplied with."""
    return [
        name
        for name, header in headers.items()
        if len(header.shape) == 2 and name.endswith(".weight") and ".layers." in name and "norm" not in name
    ]


def _is_router(name: str) -> bool:
    return any(part in ROUTERS for part in name.split("."))


def stacked_experts(headers: Mapping[str, TensorHeader]) -> list[str]:
    """The matrices of experts that lie in one tensor for each layer, whatever they are called."""
    return [
        name
        for name, header in headers.items()
        if len(header.shape) == 3 and min(header.shape[1:]) > 1 and ".layers." in name and "conv" not in name
    ]


def _check_fused(linear: Sequence[str], chosen: set[str]) -> None:
    """Servers make one matrix of some layers: all of them have fewer bits, or none.

    Raises:
        ModelError: `skip` names some of them only.
    """
    for group in FUSED:
        for name in linear:
            stem, _, last = name.removesuffix(".weight").rpartition(".")
            mine = {f"{stem}.{other}.weight" for other in group} & set(linear) if last in group else set()
            if mine and mine & chosen and not mine <= chosen:
                raise ModelError(
                    f"`skip` names some of {', '.join(group)} in {stem} only, which servers fuse into one matrix",
                    hint="skip all of them, or none",
                )


def check_divisible(headers: Mapping[str, TensorHeader], chosen: Sequence[str], columns: int, rows: int) -> None:
    """Refuse layers whose inputs or outputs the layout cannot divide.

    Raises:
        ModelError: names them all.
    """
    odd = [
        f"{name} {tuple(headers[name].shape)}"
        for name in chosen
        if headers[name].shape[1] % columns or headers[name].shape[0] % rows
    ]
    if odd:
        raise ModelError(
            f"{len(odd)} layers cannot be quantized: their inputs are not a multiple of {columns}, or their outputs of "
            f"{rows}: {', '.join(odd[:4])}",
            hint="choose a smaller `group_size`, or `skip` these layers",
        )


def check_done(folder: Path, chosen: Sequence[str], written: Mapping[str, TensorHeader], marks: Sequence[str]) -> None:
    """Make sure that every layer that should have fewer bits has them.

    Args:
        marks: The tensors that a quantized layer has.

    Raises:
        ModelError: a layer was left as it was.
    """
    left = [name for name in chosen if not all(f"{name.removesuffix('.weight')}.{mark}" in written for mark in marks)]
    if left:
        raise ModelError(f"{len(left)} layers were not quantized: {', '.join(left[:4])}", where=str(folder))
