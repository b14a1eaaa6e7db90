"""The config of the exporter ``gguf``."""

from __future__ import annotations

from typing import Literal

from luthier.api import Config, Field

FileType = Literal[
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K"
]  # fmt: skip

LARGEST_KL: dict[FileType, float] = {
    "F32": 0.001, "F16": 0.001, "BF16": 0.02, "Q8_0": 0.02, "Q6_K": 0.05, "Q5_K_M": 0.1, "Q5_K_S": 0.1, "Q4_K_M": 0.25,
    "Q4_K_S": 0.25, "Q3_K_L": 0.5, "Q3_K_M": 0.5, "Q3_K_S": 0.7, "Q2_K": 1.5,
}  # fmt: skip
"""Mean KL divergence in nats above which a file is not merely coarse but wrong.

Ten times and more what honest quantization costs even very small models; a lost permutation, a wrong
rotary base or a mixed-up tensor costs several nats.
"""


class GgufConfig(Config):
    """One GGUF file per type, each loaded and compared in llama.cpp."""

    types: list[FileType] = Field(default=["F16"], min_length=1)
    """The types of the weights, named as llama.cpp names them."""
    max_kl: float | None = Field(default=None, gt=0)
    """The largest mean KL divergence to the model it came from, in nats per token; by default what is
    far beyond rounding for each type."""
