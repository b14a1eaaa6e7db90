"""DeepSeek V2 and V3: latent attention, and experts after the first layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from luthier.api import ModelError
from luthier_plugins.gguf.architectures import Metadata, Planned
from luthier_plugins.gguf.architectures.decoder import Decoder

import gguf

SAME = 1e-6
"""How far a factor may be from 1."""


class DeepseekV2(Decoder):
    """DeepseekV2ForCausalLM, the Lite one too."""

    name: ClassVar[str] = "deepseek2"
    model: ClassVar[gguf.MODEL_ARCH] = gguf.MODEL_ARCH.DEEPSEEK2
    scalings: ClassVar[tuple[str, ...]] = ("default", "yarn")
    gating: ClassVar[int] = 1
    """Softmax over the experts."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.refuse(hidden_act="silu", attention_bias=False, moe_layer_freq=1)
        self.rope_dim: int = config["qk_rope_head_dim"]
        self.key_dim: int = config["qk_nope_head_dim"]
        self.value_dim: int = config["v_head_dim"]
        self.check_routing()

    def check_routing(self) -> None:
        """Refuse routing that llama.cpp does not have."""
        if (self.config.get("n_group") or 1) > 1 and self.config.get("topk_method") != "greedy":
            raise ModelError(
                "llama.cpp has no routing that chooses groups of experts by their best one",
                hint="serve it with vLLM: export it with the exporter `hf`",
            )

    def metadata(self) -> Metadata:
        config, latent = self.config, self.config["kv_lora_rank"]
        found = super().metadata() | {
            # Keys and values are one latent vector for all heads.
            "attention.head_count_kv": 1,
            "attention.key_length": latent + self.rope_dim,
            "attention.value_length": latent,
            "attention.key_length_mla": self.key_dim + self.rope_dim,
            "attention.value_length_mla": self.value_dim,
            "attention.kv_lora_rank": latent,
            "rope.dimension_count": self.rope_dim,
            "leading_dense_block_count": config["first_k_dense_replace"],
            "expert_feed_forward_length": config["moe_intermediate_size"],
            "expert_shared_count": config["n_shared_experts"],
            "expert_weights_scale": float(config["routed_scaling_factor"]),
            "expert_weights_norm": bool(config.get("norm_topk_prob")),
            "expert_gating_func": self.gating,
        }
        if config.get("q_lora_rank"):
            found["attention.q_lora_rank"] = config["q_lora_rank"]
        return found | self.experts(config["n_routed_experts"], config["num_experts_per_tok"])

    def scaling(self) -> Metadata:
        found = super().scaling()
        if self.rope_type == "yarn":
            factor = self.attention_factor()
            if abs(factor - 1.0) > SAME:
                raise ModelError(
                    f"llama.cpp has no {self.name} whose rotary settings give YaRN's attention factor {factor:.4g}, "
                    "only 1: `mscale` and `mscale_all_dim` have to be the same"
                )
            del found["rope.scaling.attn_factor"]
            found["rope.scaling.yarn_log_multiplier"] = 0.1 * float(self.rope.get("mscale_all_dim") or 0)
        return found

    def tensors(self, name: str, shape: tuple[int, ...]) -> Iterator[Planned]:
        stem, _, last = name.rpartition("kv_b_proj")
        if stem and last == ".weight":
            unit = self.key_dim + self.value_dim
            heads, latent = shape[0] // unit, shape[1]
            # What makes keys is applied to the queries instead, transposed.
            yield Planned(
                self.tensor_name(f"{stem}k_b_proj.weight"), (heads, latent, self.key_dim), (name,), self._keys, unit
            )
            yield Planned(
                self.tensor_name(f"{stem}v_b_proj.weight"), (heads, self.value_dim, latent), (name,), self._values, unit
            )
        elif name.endswith("e_score_correction_bias"):
            target = self.tensor_name(name.replace("_bias", ".bias"))
            yield Planned(target, shape, (name,))
        else:
            yield from super().tensors(name, shape)

    def _by_head(self, rows: np.ndarray) -> np.ndarray:
        return rows.reshape(-1, self.key_dim + self.value_dim, rows.shape[1])

    def _keys(self, rows: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(self._by_head(rows)[:, : self.key_dim].swapaxes(1, 2))

    def _values(self, rows: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(self._by_head(rows)[:, self.key_dim :])


class DeepseekV3(DeepseekV2):
    """DeepseekV3ForCausalLM: experts are chosen by sigmoids with a bias, in groups."""

    gating: ClassVar[int] = 2

    def check_routing(self) -> None:
        self.refuse(scoring_func="sigmoid", topk_method="noaux_tc", rope_interleave=True)

    def metadata(self) -> Metadata:
        config = self.config
        groups: Metadata = {"expert_group_count": config["n_group"], "expert_group_used_count": config["topk_group"]}
        return super().metadata() | groups
