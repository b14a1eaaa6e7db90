"""The mixtures that dense models can become, and what their tensors and settings are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SILENT = 256
"""The width of a shared expert that says nothing: one block of llama.cpp's K-quants."""


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of mixture.

    Attributes:
        architecture: The class of the mixture, and `model_type` its name in ``config.json``.
        block: What a layer's feed-forward part is called.
        names: What an expert's three matrices are called.
        shared: Whether each layer has an expert for all tokens. Dense models have none to give: theirs is small and
            adds nothing until it is trained.
        biases: Whether attention may have the biases that the config asks for.
        count: The setting that holds the number of experts.
        settings: What else the config says.
    """

    architecture: str
    model_type: str
    block: str = "mlp"
    names: Mapping[str, str] = field(
        default_factory=lambda: {name: name for name in ("gate_proj", "up_proj", "down_proj")}
    )
    shared: bool = False
    biases: bool = True
    count: str = "num_experts"
    settings: Mapping[str, Any] = field(
        default_factory=lambda: {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    )

    def config(self, dense: Mapping[str, Any], experts: int, experts_per_token: int) -> dict[str, Any]:
        """The ``config.json`` of a mixture made of models with the config `dense`."""
        dropped = ("mlp_bias", "pretraining_tp", *(() if self.biases else ("attention_bias",)))
        width = int(dense["intermediate_size"])
        widths = {} if self.model_type == "mixtral" else {"moe_intermediate_size": width}
        return {
            **{key: value for key, value in dense.items() if key not in dropped},
            "architectures": [self.architecture],
            "model_type": self.model_type,
            self.count: experts,
            "num_experts_per_tok": experts_per_token,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
            "sliding_window": dense.get("sliding_window"),
            **widths,
            **({"shared_expert_intermediate_size": self.silent(width)} if self.shared else {}),
            **self.settings,
            # The shares of all experts together are 1 as they are; llama.cpp knows Qwen 2's mixtures no other way.
            **({"norm_topk_prob": experts_per_token < experts} if self.shared else {}),
        }

    def silent(self, width: int) -> int:
        """The width of the shared expert, where the others have the width `width`."""
        return min(SILENT, width)


MIXTRAL = Family("MixtralForCausalLM", "mixtral", "block_sparse_moe",
                 {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
                 biases=False, count="num_local_experts", settings={})  # fmt: skip
FAMILIES = {
    "LlamaForCausalLM": MIXTRAL,
    "MistralForCausalLM": MIXTRAL,
    "Qwen2ForCausalLM": Family("Qwen2MoeForCausalLM", "qwen2_moe", shared=True),
    "Qwen3ForCausalLM": Family("Qwen3MoeForCausalLM", "qwen3_moe"),
}
"""What models of each architecture become."""
