"""An adapter as a separate GGUF file, which llama.cpp adds to its base when it loads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from luthier.api import ModelError
from luthier_plugins.gguf.architectures import Planned
from luthier_plugins.gguf.write import Source
from torch import Tensor

import gguf

WRAPPED = "base_model.model."
ACTIVE = "default"


def updates_of(model: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The low-rank updates of a PEFT model: each weight's name, A of shape (r, columns), and B times the scale of shape
    (rows, r).

    Raises:
        ModelError: the adapter does more than that.
    """
    for name, module in model.named_modules():
        if ACTIVE not in getattr(module, "lora_A", {}):
            if ACTIVE in getattr(module, "lora_embedding_A", {}):
                raise ModelError("llama.cpp takes no adapter on the embedding", where=name, hint=FOLD)
            continue
        if ACTIVE in getattr(module, "lora_magnitude_vector", {}):
            raise ModelError("llama.cpp takes no DoRA adapter", where=name, hint=FOLD)
        a, b = module.lora_A[ACTIVE].weight.detach(), module.lora_B[ACTIVE].weight.detach()
        yield f"{name.removeprefix(WRAPPED)}.weight", a.float().cpu(), (b * module.scaling[ACTIVE]).float().cpu()


FOLD = "export the whole model: leave `adapter` out, and it is folded into its base"


def write_lora(path: Path, source: Source, model: Any, key: str) -> int:
    """Write the adapter of a PEFT model.

    Args:
        source: The base, as it is written.
        key: What identifies the adapter.

    Returns:
        How many weights it changes.

    Raises:
        ModelError: llama.cpp cannot add it to the base.
    """
    places = {part.sources[0]: part for part in source.parts if len(part.sources) == 1}
    writer = gguf.GGUFWriter(path, source.architecture.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(key)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    # The scale is in B already; 0 says so.
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
    count = 0
    for name, a, b in updates_of(model):
        part = places.get(name)
        if part is None or len(part.shape) != 2:
            raise ModelError(
                "this weight is a different tensor in GGUF, to which no adapter can be added", where=name, hint=FOLD
            )
        writer.add_tensor(f"{part.name}.lora_a", a.numpy())
        writer.add_tensor(f"{part.name}.lora_b", _rows(part, b.numpy()))
        count += 1
    if not count:
        raise ModelError("the adapter changes no weight of a linear layer", hint=FOLD)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return count


def _rows(part: Planned, b: np.ndarray) -> np.ndarray:
    """B with its rows in the order of the weight's in GGUF."""
    return np.ascontiguousarray(part.convert(b))
