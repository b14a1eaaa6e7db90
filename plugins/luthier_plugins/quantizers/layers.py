"""Which weights get fewer bits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from luthier.api import ModelError
from luthier.artifacts.models import TensorHeader

ROUTERS = re.compile(r"\.(gate|router|shared_expert_gate)\.weight$")
EXPERT = re.compile(r"\.experts\.\d+\.")


def layers_of(headers: Mapping[str, TensorHeader], skip: Sequence[str]) -> list[str]:
    """The weights of all linear layers inside of the model's layers, without those to skip.

    Raises:
        ModelError: a pattern to skip is found in no name, or nothing is left.
    """
    linear = [name for name, header in headers.items()
              if len(header.shape) == 2 and name.endswith(".weight") and ".layers." in name
              and not ROUTERS.search(name) and "norm" not in name]  # fmt: skip
    for pattern in skip:
        if not any(re.search(pattern, name) for name in linear):
            raise ModelError(f"`skip` has {pattern!r}, which is found in the name of no linear layer",
                             hint=f"names are like {', '.join(linear[:3])}")  # fmt: skip
    chosen = [name for name in linear if not any(re.search(pattern, name) for pattern in skip)]
    if not chosen:
        raise ModelError("no layer is left to quantize", hint="`skip` fewer of them")
    return chosen


def check_divisible(headers: Mapping[str, TensorHeader], chosen: Sequence[str], columns: int, rows: int) -> None:
    """Refuse layers whose inputs or outputs the layout cannot divide.

    Raises:
        ModelError: names them all.
    """
    odd = [f"{name} {tuple(headers[name].shape)}" for name in chosen
           if headers[name].shape[1] % columns or headers[name].shape[0] % rows]  # fmt: skip
    if odd:
        raise ModelError(
            f"{len(odd)} layers cannot be quantized: their inputs are no multiple of {columns}, or their outputs of "
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
    left = [name for name in chosen
            if not all(f"{name.removesuffix('.weight')}.{mark}" in written for mark in marks)]  # fmt: skip
    if left:
        raise ModelError(f"{len(left)} layers were not quantized: {', '.join(left[:4])}", where=str(folder))
