"""Llama, Mistral and Mixtral: one architecture in llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import numpy as np
from luthier_plugins.gguf.architectures import Metadata, Planned
from luthier_plugins.gguf.architectures.decoder import Decoder

import gguf


class Llama(Decoder):
    """LlamaForCausalLM and MistralForCausalLM, with plain rotary embeddings and those of Llama 3."""

    name: ClassVar[str] = "llama"
    model: ClassVar[gguf.MODEL_ARCH] = gguf.MODEL_ARCH.LLAMA

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.refuse(hidden_act="silu")

    def tensors(self, name: str, shape: tuple[int, ...]) -> Iterator[Planned]:
        if name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
            yield Planned(
                self.tensor_name(name), shape, (name,), partial(interleaved, size=self.head_dim), self.head_dim
            )
        else:
            yield from super().tensors(name, shape)


class Mixtral(Llama):
    """MixtralForCausalLM."""

    def metadata(self) -> Metadata:
        return super().metadata() | self.experts(self.config["num_local_experts"], self.config["num_experts_per_tok"])


def interleaved(rows: np.ndarray, size: int) -> np.ndarray:
    """Rows from halves to pairs: llama.cpp rotates neighbouring channels, transformers channel i and i + half.

    Args:
        rows: Those of some heads of a projection, shape (heads * size, ...).
        size: Channels of a head.
    """
    halves = rows.reshape(-1, 2, size // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))
