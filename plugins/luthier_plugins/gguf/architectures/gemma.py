"""Gemma, Gemma 2 and Gemma 3 (the text models)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from luthier.api import ModelError
from luthier_plugins.gguf.architectures import Metadata, Planned
from luthier_plugins.gguf.architectures.decoder import Decoder

import gguf


class Gemma(Decoder):
    """GemmaForCausalLM: norms are stored as what is added to 1."""

    name: ClassVar[str] = "gemma"
    model: ClassVar[gguf.MODEL_ARCH] = gguf.MODEL_ARCH.GEMMA
    scalings: ClassVar[tuple[str, ...]] = ("default",)

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.refuse(hidden_activation="gelu_pytorch_tanh", attention_bias=False)

    def tensors(self, name: str, shape: tuple[int, ...]) -> Iterator[Planned]:
        if name.endswith("norm.weight"):
            yield Planned(self.tensor_name(name), shape, (name,), lambda rows: rows + 1)
        else:
            yield from super().tensors(name, shape)


class Gemma2(Gemma):
    """Gemma2ForCausalLM: every other layer sees a window, scores and logits are capped."""

    name: ClassVar[str] = "gemma2"
    model: ClassVar[gguf.MODEL_ARCH] = gguf.MODEL_ARCH.GEMMA2
    largest: ClassVar[int] = 46
    """The layers of the 27 B model, which llama.cpp knows by them: its scores are scaled differently."""
    period: ClassVar[int] = 2

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        _same_layers(config.get("layer_types"), self.period)
        scale = config["hidden_size"] / self.heads if self.layers == self.largest else self.head_dim
        if not math.isclose(config["query_pre_attn_scalar"], scale):
            raise ModelError(
                f"llama.cpp scales this {self.name}'s scores by 1/sqrt({scale:g}), "
                f"the model by 1/sqrt({config['query_pre_attn_scalar']})"
            )

    @property
    def context_length(self) -> int:
        return self.config["max_position_embeddings"]

    def metadata(self) -> Metadata:
        found = super().metadata() | {"attention.sliding_window": self.config["sliding_window"]}
        for key, name in (
            ("attn_logit_softcapping", "attn_logit_softcapping"),
            ("final_logit_softcapping", "final_logit_softcapping"),
        ):
            if self.config.get(name):
                found[key] = float(self.config[name])
        return found


class Gemma3(Gemma2):
    """Gemma3ForCausalLM: five layers with a window for one without, each kind with its own rotary settings."""

    name: ClassVar[str] = "gemma3"
    model: ClassVar[gguf.MODEL_ARCH] = gguf.MODEL_ARCH.GEMMA3
    scalings: ClassVar[tuple[str, ...]] = ("default", "linear")
    largest: ClassVar[int] = 62
    period: ClassVar[int] = 6

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.refuse(attn_logit_softcapping=0, use_bidirectional_attention=False)

    def rope_settings(self) -> dict[str, Any]:
        rope: dict[str, Any] = self.config.get("rope_parameters") or {}
        self.local: float = rope.get("sliding_attention", {}).get("rope_theta") or self.config["rope_local_base_freq"]
        return rope.get("full_attention") or super().rope_settings()

    def metadata(self) -> Metadata:
        return super().metadata() | {"rope.freq_base_swa": float(self.local)}


def _same_layers(given: Sequence[str] | None, period: int) -> None:
    """Refuse other places of the layers without a window than the last of each period."""
    for place, kind in enumerate(given or []):
        if (kind == "full_attention") != (place % period == period - 1):
            raise ModelError(f"llama.cpp expects a layer without a window every {period} layers; layer {place} differs")
