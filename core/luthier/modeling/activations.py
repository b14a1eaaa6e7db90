"""What servers do to the inputs of layers with 8-bit activations, done in floats: their error belongs to the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from luthier.api.errors import ModelError
from luthier.artifacts.json_files import read_json
from luthier.artifacts.tensors import tensor_headers

Kind = Literal["int", "float"]
LARGEST_FLOAT = 448.0
"""Of the 8-bit floats with 4 bits of exponent (E4M3)."""
HALF_RANGE = 127.5
"""Half of the 255 steps of an 8-bit integer."""
MARKS = ("weight_scale", "_weight_scale")
"""What a layer with 8-bit weights has beside them, in compressed-tensors and in torchao."""


def rounded(inputs: Tensor, kind: Kind) -> Tensor:
    """Each token's inputs, shape (..., channels), as 8-bit numbers with its own scale have them."""
    largest = inputs.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12)
    if kind == "int":
        scale = largest / HALF_RANGE
        return (inputs / scale).round().clamp(-128, 127) * scale
    scale = largest / LARGEST_FLOAT
    return (inputs / scale).to(torch.float8_e4m3fn).to(inputs.dtype) * scale


def activations_of(folder: Path) -> Kind | None:
    """What a folder's quantization says that servers do with the inputs of its layers; None: nothing."""
    config: Mapping[str, Any] = read_json(folder / "config.json").get("quantization_config") or {}
    if config.get("quant_method") == "compressed-tensors":
        group: Mapping[str, Any] = next(iter(config["config_groups"].values()))
        activations: Mapping[str, Any] | None = group.get("input_activations")
        return activations["type"] if activations else None
    if config.get("quant_method") == "torchao":
        named = config["quant_type"]["default"]["_type"]
        return "int" if named == "Int8DynamicActivationInt8WeightConfig" else None
    return None


def round_activations(model: nn.Module, folder: Path) -> None:
    """Have a model in floats compute as servers do with the folder that it came from.

    Experts that transformers keeps in one module get rounded inputs, what is between their matrices is not rounded.
    """
    kind = activations_of(folder)
    if kind is None:
        return
    for name in {key.rpartition(".")[0] for key in tensor_headers(folder) if key.rpartition(".")[2] in MARKS}:
        stem = name.partition(".experts.")[0]
        try:
            module = model.get_submodule(f"{stem}.experts" if ".experts." in name else name)
        except AttributeError as error:
            raise ModelError(
                f"transformers has no layer of the name {name}: how its inputs are rounded cannot be compared",
                where=str(folder),
                hint="`skip` it",
            ) from error
        if not hasattr(module, "rounds_inputs"):
            module.rounds_inputs = True  # type: ignore[assignment]
            module.register_forward_pre_hook(_hook(kind))


def _hook(kind: Kind) -> Callable[..., Any]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (rounded(inputs[0], kind), *inputs[1:])

    return hook
