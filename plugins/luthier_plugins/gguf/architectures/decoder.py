"""What the decoders have in common."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from luthier.api import ModelError
from luthier_plugins.gguf.architectures import Metadata, Planned

import gguf

EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight")
DEFAULT_CONTEXT = 4096
"""The context of a model that states none."""
SCALINGS = ("default", "linear", "llama3", "yarn")

COMPUTED = "rotary_emb.inv_freq"
"""Old checkpoints keep what is computed from the config; a file that has it cannot be loaded."""


class Decoder:
    """Attention and feed-forward layers with rotary embeddings; families change what is different in them."""

    name: ClassVar[str]
    model: ClassVar[gguf.MODEL_ARCH]
    scalings: ClassVar[tuple[str, ...]] = SCALINGS

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.layers: int = config["num_hidden_layers"]
        self.heads: int = config["num_attention_heads"]
        self.kv_heads: int = config.get("num_key_value_heads") or self.heads
        self.head_dim: int = config.get("head_dim") or config["hidden_size"] // self.heads
        self.rope = self.rope_settings()
        self.rope_type: str = self.rope.get("rope_type") or self.rope.get("type") or "default"
        if self.rope_type not in self.scalings:
            raise ModelError(f"the rotary scaling '{self.rope_type}' cannot be exported to GGUF for {self.name}")
        self._names = gguf.get_tensor_name_map(self.model, self.layers)

    def rope_settings(self) -> dict[str, Any]:
        """The rotary settings: transformers 5 has them in one mapping, before, theta stood beside the scaling."""
        rope: dict[str, Any] = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        return {"rope_theta": self.config.get("rope_theta", 10000.0), **rope}

    def refuse(self, **wanted: Any) -> None:
        """Refuse a model whose config says something other than llama.cpp does.

        Args:
            wanted: What llama.cpp does, by the name of the setting; a setting that is not there is what it should be.
        """
        for name, value in wanted.items():
            found = self.config.get(name)
            if found is not None and found != value:
                raise ModelError(f"llama.cpp has no {self.name} with {name} = {found}, only with {value}")

    @property
    def context_length(self) -> int:
        """How long the model's texts are; llama.cpp's full attention is right within a sliding window only."""
        config = self.config
        window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
        return int(min(config.get("max_position_embeddings") or DEFAULT_CONTEXT, window or math.inf))

    def metadata(self) -> Metadata:
        config = self.config
        found: Metadata = {
            "vocab_size": config["vocab_size"],
            "context_length": self.context_length,
            "embedding_length": config["hidden_size"],
            "block_count": self.layers,
            "feed_forward_length": config["intermediate_size"],
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim,
            "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
            "rope.dimension_count": self.head_dim,
            "rope.freq_base": float(self.rope["rope_theta"]),
        }
        return found | self.scaling()

    def scaling(self) -> Metadata:
        """The keys of a rotary scaling that is not a tensor."""
        if self.rope_type not in ("linear", "yarn"):
            return {}
        found: Metadata = {"rope.scaling.type": self.rope_type, "rope.scaling.factor": self.stretching}
        if self.rope_type == "yarn":
            found["rope.scaling.original_context_length"] = self.rope["original_max_position_embeddings"]
            found["rope.scaling.yarn_beta_fast"] = float(self.rope.get("beta_fast") or 32)
            found["rope.scaling.yarn_beta_slow"] = float(self.rope.get("beta_slow") or 1)
            if self.rope.get("truncate") is False:
                raise ModelError(
                    "llama.cpp has no YaRN with `truncate: false`, which this model's rotary settings have"
                )
            found["rope.scaling.attn_factor"] = self.attention_factor() / _yarn_scale(self.stretching)
        return found

    @property
    def stretching(self) -> float:
        """How many times longer texts may be than those that the model was first made for."""
        factor = self.rope.get("factor")
        if factor is None:
            factor = self.config["max_position_embeddings"] / self.rope["original_max_position_embeddings"]
        return float(factor)

    def attention_factor(self) -> float:
        """What YaRN multiplies queries and keys with, as transformers computes it from its settings; llama.cpp
        multiplies what a file says with its own default.
        """
        rope = self.rope
        if rope.get("attention_factor") is not None:
            return float(rope["attention_factor"])
        scale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        if scale and all_dim:
            return _yarn_scale(self.stretching, scale) / _yarn_scale(self.stretching, all_dim)
        return _yarn_scale(self.stretching)

    def experts(self, count: int, used: int) -> Metadata:
        """The keys of a mixture of experts."""
        return {"expert_count": count, "expert_used_count": used}

    def planned(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Planned]:
        stacks: dict[str, list[tuple[int, str]]] = {}
        for name, shape in shapes.items():
            if name.endswith(COMPUTED):
                continue
            if found := EXPERT.fullmatch(name):
                stacks.setdefault(f"{found[1]}.{found[3]}.weight", []).append((int(found[2]), name))
            else:
                yield from self.tensors(name, shape)
        for stack, numbered in stacks.items():
            sources = tuple(name for _, name in sorted(numbered))
            yield Planned(self.tensor_name(stack), (len(sources), *shapes[sources[0]]), sources)

    def tensors(self, name: str, shape: tuple[int, ...]) -> Iterator[Planned]:
        """What becomes of one tensor of the model; one alone, for most."""
        yield Planned(self.tensor_name(name), shape, (name,))

    def tensor_name(self, name: str) -> str:
        """The name in GGUF.

        Raises:
            ModelError: it has none.
        """
        found = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ModelError("GGUF has no place for this tensor", where=name)
        return found

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


def _yarn_scale(factor: float, scale: float = 1.0) -> float:
    """YaRN's own attention factor (Peng et al. 2023, arXiv:2309.00071, equation 22): 1 + 0.1 ln(factor)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
