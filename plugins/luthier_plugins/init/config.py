"""The config of the stage ``init``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from luthier.api import DatasetInputs, Field, StageConfig, schema_problems
from luthier.api.artifact import ArtifactKind
from pydantic import model_validator


class InitConfig(StageConfig):
    """A new, small model. Sizes are multiples of 256 by default, as llama.cpp's K-quants want them."""

    kind_made: ClassVar[ArtifactKind] = "model"

    data: DatasetInputs
    """What the tokenizer is trained on."""
    vocab_size: int = Field(default=1024, ge=300)
    """Tokens in the vocabulary, special ones included."""
    hidden_size: int = Field(default=256, gt=0)
    """The width of the residual stream."""
    intermediate_size: int = Field(default=512, gt=0)
    """The width inside the feed-forward layers."""
    layers: int = Field(default=4, gt=0)
    """The number of layers."""
    heads: int = Field(default=4, gt=0)
    """The number of attention heads."""
    kv_heads: int = Field(default=2, gt=0)
    """The number of key and value heads."""
    context_length: int = Field(default=512, gt=0)
    """The longest sequence the model is made for."""
    rope_theta: float = Field(default=10000.0, gt=0)
    """The base of the rotary embedding's frequencies."""
    tied: bool = True
    """Whether the output head shares the embedding."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """The dtype of the stored weights; training computes in fp32."""

    def input_problems(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        return schema_problems("init", inputs, ("text", "messages", "preference", "labelled"))

    @model_validator(mode="after")
    def _heads_fit(self) -> InitConfig:
        if self.hidden_size % self.heads or self.heads % self.kv_heads:
            raise ValueError("`heads` has to divide `hidden_size`, and `kv_heads` to divide `heads`")
        return self
