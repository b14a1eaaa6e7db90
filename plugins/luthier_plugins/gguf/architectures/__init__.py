"""What differs between architectures when a model becomes a GGUF file: one small file for each family."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from luthier.api import ModelError
from luthier.serving.gguf import Architecture, Metadata, Planned, unchanged

ARCHITECTURES = {
    "LlamaForCausalLM": "luthier_plugins.gguf.architectures.llama:Llama",
    "MistralForCausalLM": "luthier_plugins.gguf.architectures.llama:Llama",
    "MixtralForCausalLM": "luthier_plugins.gguf.architectures.llama:Mixtral",
    "Qwen2ForCausalLM": "luthier_plugins.gguf.architectures.qwen:Qwen2",
    "Qwen3ForCausalLM": "luthier_plugins.gguf.architectures.qwen:Qwen3",
    "Qwen2MoeForCausalLM": "luthier_plugins.gguf.architectures.qwen:Qwen2Moe",
    "Qwen3MoeForCausalLM": "luthier_plugins.gguf.architectures.qwen:Qwen3Moe",
    "GemmaForCausalLM": "luthier_plugins.gguf.architectures.gemma:Gemma",
    "Gemma2ForCausalLM": "luthier_plugins.gguf.architectures.gemma:Gemma2",
    "Gemma3ForCausalLM": "luthier_plugins.gguf.architectures.gemma:Gemma3",
    "Phi3ForCausalLM": "luthier_plugins.gguf.architectures.phi:Phi3",
    "DeepseekV2ForCausalLM": "luthier_plugins.gguf.architectures.deepseek:DeepseekV2",
    "DeepseekV3ForCausalLM": "luthier_plugins.gguf.architectures.deepseek:DeepseekV3",
}
"""The built-in converters, as ``module:Class`` by the name of the architecture in ``config.json``."""
__all__ = ["ARCHITECTURES", "Architecture", "Metadata", "Planned", "architecture_for", "unchanged"]


def architecture_for(config: dict[str, Any], known: Mapping[str, str]) -> Architecture:
    """The converter for a model.

    Args:
        config: Its ``config.json``.
        known: Converters as ``module:Class`` by the name of the architecture.

    Raises:
        ModelError: there is none.
    """
    name = (config.get("architectures") or ["?"])[0]
    if name not in known:
        raise ModelError(
            f"the architecture {name} cannot be exported to GGUF by Luthier itself",
            hint="name a converter script with `converter:`, such as llama.cpp's convert_hf_to_gguf.py; "
            f"without one these can: {', '.join(sorted(known))}",
        )
    module, _, class_name = known[name].partition(":")
    return getattr(import_module(module), class_name)(config)
