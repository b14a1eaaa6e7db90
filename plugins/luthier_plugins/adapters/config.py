"""The configs of the adapters."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from luthier.api import Config, Field
from pydantic import model_validator

Names = Annotated[list[str], Field(min_length=1)]


class AdapterConfig(Config):
    """Where an adapter goes."""

    target_modules: Literal["all-linear"] | Names = "all-linear"
    """The layers that get an adapter, by their names or the ends of them; all linear ones but the output head by
    default."""
    layers: list[int] | None = Field(default=None, min_length=1)
    """The numbers of the blocks whose layers get one; by default all."""
    modules_to_save: list[str] = []
    """Modules that are trained in full beside it, such as `lm_head`."""


class LoraConfig(AdapterConfig):
    """A low-rank adapter."""

    r: int = Field(default=16, gt=0)
    """The rank."""
    lora_alpha: float = Field(default=32, gt=0)
    """The scale: updates are multiplied by lora_alpha / r."""
    rslora: bool = False
    """Whether updates are multiplied by lora_alpha / sqrt(r) instead (arXiv:2312.03732)."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the adapter."""
    init: Literal["zero", "gaussian", "pissa", "loftq"] = "zero"
    """What it begins as. `zero` and `gaussian`: no update, the first matrix drawn uniformly or normally; `pissa`: the
    principal components of the weights (arXiv:2404.02948), stored as an update of twice the rank; `loftq`: what
    quantizing the base took away (arXiv:2310.08659), for a base in 4 bits."""
    lora_plus_ratio: float | None = Field(default=None, gt=0)
    """By how much the second matrix learns faster than the first (LoRA+, arXiv:2402.12354)."""
    target_parameters: list[str] = []
    """Weights that are parameters of their own instead of layers, such as fused experts, by the ends of their names;
    `target_modules: all-linear` has them already."""
    tokens: list[str] = []
    """Tokens of the vocabulary whose embeddings are trained beside it."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained beside it."""


class QloraConfig(LoraConfig):
    """A low-rank adapter on a base in 4 or 8 bits."""

    bits: Literal[4, 8] = 4
    """Bits of the base's weights."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """How 4 bits are laid out."""
    double_quant: bool = True
    """Quantize the quantization constants of 4 bits too."""

    @model_validator(mode="after")
    def _init_fits(self) -> QloraConfig:
        if self.init == "pissa":
            raise ValueError("`init: pissa` changes the base, which is quantized: use `loftq`, or the adapter `lora`")
        if self.init == "loftq" and self.bits != 4:
            raise ValueError("`init: loftq` is for a base in 4 bits")
        return self


class VeraConfig(AdapterConfig):
    """VeRA: shared random matrices, trained scales."""

    r: int = Field(default=256, gt=0)
    """The rank of the shared matrices."""
    d_initial: float = 0.1
    """What the scales of the inner dimension begin as."""
    vera_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the adapter."""


class Ia3Config(AdapterConfig):
    """IA3: trained scales of activations."""

    target_modules: Literal["all-linear"] | Names = ["k_proj", "v_proj", "down_proj"]
    """The layers whose outputs are scaled, ..."""
    feedforward_modules: list[str] = ["down_proj"]
    """... and those of them whose inputs are scaled instead."""

    @model_validator(mode="after")
    def _parts_of_targets(self) -> Ia3Config:
        listed = self.target_modules if isinstance(self.target_modules, list) else None
        odd = [name for name in self.feedforward_modules if listed is not None and name not in listed]
        if odd:
            raise ValueError(f"`feedforward_modules` names {odd[0]}, which `target_modules` does not")
        return self


class OftConfig(AdapterConfig):
    """OFT: orthogonal rotations of weights."""

    block_size: int = Field(default=32, gt=0)
    """The size of the rotated blocks; it has to divide the inputs of every layer."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """The share of blocks that are left out of a step."""


class PeftTunerConfig(Config):
    """Any tuner that PEFT has."""

    type: str = "LOHA"
    """Its type in PEFT, such as `LOHA`, `LOKR`, `BOFT` or `HRA`."""
    options: dict[str, Any] = {}
    """The fields of its config in PEFT."""
