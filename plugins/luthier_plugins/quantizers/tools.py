"""The tools with their own environments that quantizers run."""

from __future__ import annotations

from luthier.api import ToolEnvironment

AUTO_ROUND = ToolEnvironment(
    "auto-round",
    "rounding that learns which way to round, for the quantizers awq and gptq",
    ("torch==2.13.0", "transformers==5.23.0", "auto-round==0.16.1"),
)
TORCHAO = ToolEnvironment(
    "torchao",
    "the quantizer torchao",
    ("torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "torchao==0.18.0"),
)
