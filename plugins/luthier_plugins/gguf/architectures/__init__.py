"""What differs between architectures when a model becomes a GGUF file: one small file for each."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol

import numpy as np
from luthier.api import ModelError

ARCHITECTURES = {"LlamaForCausalLM": "llama:Llama"}
"""The converter of each architecture in Hugging Face's naming, as ``module:Class`` of this package."""

Metadata = dict[str, int | float | str | bool]


class Architecture(Protocol):
    """Converts one architecture; made with the content of its ``config.json``."""

    name: str
    """The architecture's name in GGUF."""

    def metadata(self) -> Metadata:
        """The keys below ``<name>.``: sizes, counts, rotary settings."""
        ...

    def tensor_name(self, name: str) -> str:
        """The tensor's name in GGUF. Raises ModelError for one that does not belong there."""
        ...

    def convert(self, name: str, tensor: np.ndarray) -> np.ndarray:
        """The tensor as llama.cpp wants it; `name` is the one in the safetensors file."""
        ...

    def extra_tensors(self) -> dict[str, np.ndarray]:
        """Tensors of GGUF that no safetensors file has."""
        ...


def architecture_for(config: dict[str, Any]) -> Architecture:
    """The converter for a model.

    Raises:
        ModelError: there is none.
    """
    name = (config.get("architectures") or ["?"])[0]
    if name not in ARCHITECTURES:
        raise ModelError(
            f"the architecture {name} cannot be exported to GGUF yet",
            hint=f"these can: {', '.join(ARCHITECTURES)}",
        )
    module, _, class_name = ARCHITECTURES[name].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), class_name)(config)
