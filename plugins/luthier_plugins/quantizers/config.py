"""The configs of the quantizers."""

from __future__ import annotations

from typing import Literal

from luthier.api import Config, Field, Pattern

Rounding = Literal["gptq", "nearest", "auto-round"]
TorchaoType = Literal["int8", "int8-dynamic", "float8"]


class QuantizerConfig(Config):
    """What all quantizers have."""

    skip: list[Pattern] = []
    """Layers that stay as they are, by regular expressions for their names, such as ``layers\\.0\\.`` or
    ``down_proj``; output layer, embeddings and what chooses experts always do."""
    largest_kl: float = Field(default=0.02, gt=0)
    """The largest mean KL divergence to the model it came from, in nats per token."""


class GroupedConfig(QuantizerConfig):
    """Groups of inputs that share a scale."""

    group_size: Literal[32, 64, 128] = 128
    """How many inputs of a layer share a scale and a zero point."""
    rounding: Rounding = "gptq"
    """``gptq`` rounds column by column and lets the later columns make up for the error, on the calibration data
    (Frantar et al. 2022, arXiv:2210.17323), experts to nearest; ``nearest`` needs no data; ``auto-round`` learns
    which way to round (Cheng et al. 2023, arXiv:2309.05516), slowly, in its own environment that
    ``luthier doctor --install auto-round`` makes."""
    iterations: int = Field(default=200, gt=0)
    """Steps that ``auto-round`` takes for each layer."""
    largest_kl: float = Field(default=0.1, gt=0)
    """The largest mean KL divergence to the model it came from, in nats per token."""

    @property
    def needs_tool(self) -> str | None:
        return "auto-round" if self.rounding == "auto-round" else None


class AwqConfig(GroupedConfig):
    """4 bits in AutoAWQ's ``gemm`` layout."""

    bits: Literal[4] = 4
    """Bits of a weight."""
    symmetric: bool = False
    """Whether the zero point is in the middle; if not, a group uses all of its steps."""


class GptqConfig(GroupedConfig):
    """4 or 8 bits in GPTQ's layout."""

    bits: Literal[4, 8] = 4
    """Bits of a weight."""
    symmetric: bool = True
    """Whether the zero point is in the middle, as the fastest kernels want it."""


class Int8Config(QuantizerConfig):
    """Integers of 8 bits: a scale for each output, and activations rounded as they come."""


class Fp8Config(QuantizerConfig):
    """Floats of 8 bits (E4M3): a scale for each output, and activations rounded as they come."""


class TorchaoConfig(QuantizerConfig):
    """8 bits in torchao's tensors: a scale for each output.

    It runs in its own environment, which ``luthier doctor --install torchao`` makes.
    """

    type: TorchaoType = "int8"
    """``int8`` and ``float8`` round weights only; ``int8-dynamic`` rounds activations as they come, too."""

    @property
    def needs_tool(self) -> str | None:
        return "torchao"


class Nf4Config(Config):
    """4-bit NormalFloat (Dettmers et al. 2023, arXiv:2305.14314)."""

    double: bool = True
    """Whether the scales are quantized as well."""
    largest_kl: float = Field(default=0.15, gt=0)
    """The largest mean KL divergence to the model it came from, in nats per token."""
