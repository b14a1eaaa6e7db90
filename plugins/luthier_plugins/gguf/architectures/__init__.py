"""What differs between architectures when a model becomes a GGUF file: one small file for each family."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Protocol

import numpy as np
from luthier.api import ModelError

ENTRY_POINTS = "luthier_gguf_architectures"
"""The entry points by which other packages add architectures: named as in ``config.json``, ``module:Class``."""
ARCHITECTURES = {
    "LlamaForCausalLM": "llama:Llama",
    "MistralForCausalLM": "llama:Llama",
    "MixtralForCausalLM": "llama:Mixtral",
    "Qwen2ForCausalLM": "qwen:Qwen2",
    "Qwen3ForCausalLM": "qwen:Qwen3",
    "Qwen2MoeForCausalLM": "qwen:Qwen2Moe",
    "Qwen3MoeForCausalLM": "qwen:Qwen3Moe",
    "GemmaForCausalLM": "gemma:Gemma",
    "Gemma2ForCausalLM": "gemma:Gemma2",
    "Gemma3ForCausalLM": "gemma:Gemma3",
    "Phi3ForCausalLM": "phi:Phi3",
    "DeepseekV2ForCausalLM": "deepseek:DeepseekV2",
    "DeepseekV3ForCausalLM": "deepseek:DeepseekV3",
}
"""The converter of each architecture in Hugging Face's naming, as ``module:Class`` of this package."""

Metadata = dict[str, int | float | str | bool]


def unchanged(rows: np.ndarray) -> np.ndarray:
    """Most tensors are the same in GGUF."""
    return rows


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor of the GGUF file, and what it is made of.

    Attributes:
        name: Its name there.
        shape: Its shape there, rows first.
        sources: The tensors of the model that it is made of, one behind the other along the first axis.
        convert: What becomes of some rows of a source, float32.
        unit: How many rows of a source have to be converted together.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    convert: Callable[[np.ndarray], np.ndarray] = unchanged
    unit: int = 1


class Architecture(Protocol):
    """Converts one architecture; made with the content of its ``config.json``."""

    name: str
    """The architecture's name in GGUF."""

    def metadata(self) -> Metadata:
        """The keys below ``<name>.``: sizes, counts, rotary settings."""
        ...

    def planned(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Planned]:
        """The tensors of the file, from the shapes of the model's. Raises ModelError for one that has no place."""
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
    others = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    if name in others:
        return others[name].load()(config)
    if name not in ARCHITECTURES:
        raise ModelError(
            f"the architecture {name} cannot be exported to GGUF by Luthier itself",
            hint="name a converter script with `converter:`, such as llama.cpp's convert_hf_to_gguf.py; "
            f"without one these can: {', '.join(sorted({*ARCHITECTURES, *others}))}",
        )
    module, _, class_name = ARCHITECTURES[name].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), class_name)(config)
