"""An adapter as a separate GGUF file, which llama.cpp adds to its base when it loads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
from luthier.api import Artifact, ModelError
from luthier.artifacts.adapters import ADAPTER_WEIGHTS
from luthier.artifacts.json_files import read_json
from luthier.artifacts.tensors import model_tensors, safetensors_header
from luthier.merging.lowrank import EMBEDDING_A, LowRank, Unfoldable
from luthier_plugins.gguf.architectures import Planned
from luthier_plugins.gguf.write import Source
from torch import Tensor

import gguf

MAGNITUDE = ".lora_magnitude_vector"


def updates_of(model: Artifact) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The low-rank updates of an adapter, from its file alone: each weight's name, A of shape (r, columns), and B times
    the scale of shape (rows, r).

    Raises:
        ModelError: the adapter does more than that.
    """
    for name in safetensors_header(model.path / ADAPTER_WEIGHTS):
        if name.endswith(EMBEDDING_A):
            raise ModelError("llama.cpp takes no adapter on the embedding", where=name, hint=FOLD)
        if MAGNITUDE in name:
            raise ModelError("llama.cpp takes no DoRA adapter", where=name, hint=FOLD)
    base = model.base.path
    try:
        found = LowRank(model.path, model_tensors(base), read_json(base / "config.json"))
    except Unfoldable as reason:
        raise ModelError(f"llama.cpp takes no adapter with {reason}", where=str(model.path), hint=FOLD) from reason
    with closing(found):
        if found.replaced:
            name = next(iter(found.replaced))
            raise ModelError("llama.cpp takes no adapter that brings a weight whole", where=name, hint=FOLD)
        for name in found.targets:
            b, a, _ = found.factors(name)
            yield name, a, b


FOLD = "export the whole model: leave `adapter` out, and it is folded into its base"


def write_lora(path: Path, source: Source, model: Artifact) -> int:
    """Write an adapter.

    Args:
        source: The base, as it is written.
        model: The adapter.

    Returns:
        How many weights it changes.

    Raises:
        ModelError: llama.cpp cannot add it to the base.
    """
    places = {part.sources[0]: part for part in source.parts if len(part.sources) == 1}
    writer = gguf.GGUFWriter(path, source.architecture.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(model.key[:12])
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
