"""The configs of the adapters."""

from __future__ import annotations

from typing import Annotated, Literal

from luthier.api import Config, Field


class LoraConfig(Config):
    """A low-rank adapter."""

    r: int = Field(default=16, gt=0)
    """The rank."""
    lora_alpha: float = Field(default=32, gt=0)
    """The scale: updates are multiplied by lora_alpha / r."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the adapter."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """The layers that get an adapter; all linear ones but the output head by default."""


class QloraConfig(LoraConfig):
    """A low-rank adapter on a 4-bit base."""

    double_quant: bool = True
    """Quantize the quantization constants too."""
