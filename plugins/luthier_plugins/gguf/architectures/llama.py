"""Llama."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from luthier.api import ModelError
from luthier_plugins.gguf.architectures import Metadata

import gguf


class Llama:
    """LlamaForCausalLM, with plain rotary embeddings and those of Llama 3."""

    name = "llama"

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.heads: int = config["num_attention_heads"]
        self.kv_heads: int = config.get("num_key_value_heads") or self.heads
        self.head_dim: int = config.get("head_dim") or config["hidden_size"] // self.heads
        # transformers 5 keeps everything rotary in one mapping; before, theta stood beside the scaling.
        rope: dict[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
        self.rope = {"rope_theta": config.get("rope_theta", 10000.0), **rope}
        self.rope_type: str = self.rope.get("rope_type") or self.rope.get("type") or "default"
        if self.rope_type not in ("default", "linear", "llama3"):
            raise ModelError(f"the rotary scaling '{self.rope_type}' cannot be exported to GGUF yet")
        if config.get("attention_bias") or config.get("mlp_bias"):
            raise ModelError("a Llama model with biases cannot be exported to GGUF yet")
        self._names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])

    def metadata(self) -> Metadata:
        config = self.config
        found: Metadata = {
            "vocab_size": config["vocab_size"],
            "context_length": config["max_position_embeddings"],
            "embedding_length": config["hidden_size"],
            "block_count": config["num_hidden_layers"],
            "feed_forward_length": config["intermediate_size"],
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim,
            "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
            "rope.dimension_count": self.head_dim,
            "rope.freq_base": float(self.rope["rope_theta"]),
        }
        if self.rope_type == "linear":
            found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(self.rope["factor"])}
        return found

    def tensor_name(self, name: str) -> str:
        found = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ModelError("GGUF has no place for this tensor", where=name)
        return found

    def convert(self, name: str, tensor: np.ndarray) -> np.ndarray:
        if name.endswith("q_proj.weight"):
            return _interleave(tensor, self.heads)
        if name.endswith("k_proj.weight"):
            return _interleave(tensor, self.kv_heads)
        return tensor

    def extra_tensors(self) -> dict[str, np.ndarray]:
        return {"rope_freqs.weight": self._frequency_factors()} if self.rope_type == "llama3" else {}

    def _frequency_factors(self) -> np.ndarray:
        """How much slower each pair of channels turns: shape (head_dim / 2,), float32.

        The same wavelengths stay, long ones are stretched by `factor`, those between are blended.
        """
        rope = self.rope
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim
        wavelengths = 2 * math.pi * rope["rope_theta"] ** exponents
        periods = rope["original_max_position_embeddings"] / wavelengths
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        share = np.clip((periods - low) / (high - low), 0.0, 1.0)
        return (1.0 / ((1.0 - share) / rope["factor"] + share)).astype(np.float32)


def _interleave(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows from halves to pairs: llama.cpp rotates neighbouring channels, transformers channel i and i + half.

    Args:
        tensor: A projection, shape (heads * head_dim, hidden).
    """
    rows, columns = tensor.shape
    halves = tensor.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))
