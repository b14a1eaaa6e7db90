"""Qwen 2, 2.5 and 3, dense and with experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from luthier_plugins.gguf.architectures import Metadata, Planned
from luthier_plugins.gguf.architectures.decoder import Decoder

import gguf


class Qwen2(Decoder):
    """Qwen2ForCausalLM: biases in the attention."""

    name: ClassVar[str] = "qwen2"
    model: ClassVar[gguf.MODEL_ARCH] = gguf.MODEL_ARCH.QWEN2

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.refuse(hidden_act="silu")


class Qwen3(Qwen2):
    """Qwen3ForCausalLM: queries and keys are normalized."""

    name: ClassVar[str] = "qwen3"
    model: ClassVar[gguf.MODEL_ARCH] = gguf.MODEL_ARCH.QWEN3

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.refuse(attention_bias=False)


class Qwen2Moe(Qwen2):
    """Qwen2MoeForCausalLM: experts, and one that all tokens share."""

    name: ClassVar[str] = "qwen2moe"
    model: ClassVar[gguf.MODEL_ARCH] = gguf.MODEL_ARCH.QWEN2MOE

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.refuse(decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=False)

    def metadata(self) -> Metadata:
        config = self.config
        shared: Metadata = {"expert_shared_feed_forward_length": config["shared_expert_intermediate_size"]}
        return super().metadata() | _experts(self) | shared

    def tensors(self, name: str, shape: tuple[int, ...]) -> Iterator[Planned]:
        if name.endswith("shared_expert_gate.weight"):
            # One output: a vector in GGUF.
            yield Planned(self.tensor_name(name), shape[1:], (name,), lambda rows: rows[0])
            return
        yield from super().tensors(name, shape)
        if name == "model.embed_tokens.weight" and self.config.get("tie_word_embeddings"):
            # Of this architecture alone llama.cpp loads no file in which the output is not written again.
            yield Planned("output.weight", shape, (name,))


class Qwen3Moe(Qwen3):
    """Qwen3MoeForCausalLM."""

    name: ClassVar[str] = "qwen3moe"
    model: ClassVar[gguf.MODEL_ARCH] = gguf.MODEL_ARCH.QWEN3MOE

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.refuse(decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True)

    def metadata(self) -> Metadata:
        return super().metadata() | _experts(self)


def _experts(decoder: Decoder) -> Metadata:
    config = decoder.config
    found = decoder.experts(config.get("num_experts") or config["num_local_experts"], config["num_experts_per_tok"])
    return found | {"expert_feed_forward_length": config["moe_intermediate_size"]}
