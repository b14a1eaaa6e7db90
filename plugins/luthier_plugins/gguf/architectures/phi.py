"""Phi-3."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
from luthier_plugins.gguf.architectures import Metadata
from luthier_plugins.gguf.architectures.decoder import Decoder

import gguf


class Phi3(Decoder):
    """Phi3ForCausalLM: queries, keys and values in one matrix, gate and up in another, with LongRoPE."""

    name: ClassVar[str] = "phi3"
    model: ClassVar[gguf.MODEL_ARCH] = gguf.MODEL_ARCH.PHI3
    scalings: ClassVar[tuple[str, ...]] = ("default", "longrope")

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.refuse(hidden_act="silu")

    @property
    def original_length(self) -> int:
        """The length of the texts before it was stretched."""
        return self.rope.get("original_max_position_embeddings") or self.config["original_max_position_embeddings"]

    def metadata(self) -> Metadata:
        share = self.rope.get("partial_rotary_factor") or self.config.get("partial_rotary_factor") or 1.0
        found = super().metadata() | {
            "rope.dimension_count": int(share * self.head_dim),
            "rope.scaling.original_context_length": self.original_length,
            "attention.sliding_window": self.config.get("sliding_window") or 0,
        }
        if self.rope_type == "longrope":
            stretched = self.config["max_position_embeddings"] / self.original_length
            factor = math.sqrt(1 + math.log(stretched) / math.log(self.original_length)) if stretched > 1 else 1.0
            found["rope.scaling.attn_factor"] = float(self.rope.get("attention_factor") or factor)
        return found

    def extra_tensors(self) -> dict[str, np.ndarray]:
        if self.rope_type != "longrope":
            return {}
        return {
            f"rope_factors_{kind}.weight": np.array(self.rope[f"{kind}_factor"], dtype=np.float32)
            for kind in ("long", "short")
        }
