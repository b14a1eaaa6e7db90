"""The config of the exporter ``hf``."""

from __future__ import annotations

from typing import Literal

from luthier.api import Config, DatasetInput, Field, QuantizerUse
from pydantic import model_validator

Target = Literal["vllm", "tgi", "sglang", "tensorrt-llm"]
NOT_FOR_TGI = ("nf4", "torchao")
"""Quantizers whose folders TGI does not load: it rounds to NF4 itself, and knows no torchao."""


class HfConfig(Config):
    """A folder of safetensors, compared with the model it came from."""

    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """What the weights are stored as; by default as they are. Weights that do not fit into float16 are refused."""
    quantize: QuantizerUse | None = None
    """How to store the layers with fewer bits, such as ``awq`` or ``gptq``."""
    calibration: DatasetInput | None = None
    """The quantizer's calibration data; by default the data that the model was tuned on."""
    shard_size: int | None = Field(default=None, gt=0)
    """The largest size of one file, in bytes; by default 2 GB."""
    max_kl: float | None = Field(default=None, gt=0)
    """The largest mean KL divergence to the model it came from, in nats per token; by default 0.01, or what the
    quantizer says."""
    serve: list[Target] = []
    """For each of these programs: the command that starts it, a compose file, and a golden file with a script that
    checks a running server against it."""

    @model_validator(mode="after")
    def _one_of_both(self) -> HfConfig:
        if self.quantize is not None and self.dtype is not None:
            raise ValueError("`quantize` says what the weights are stored as: leave `dtype` out")
        if self.quantize is None and self.calibration is not None:
            raise ValueError("`calibration` is unused without `quantize`: leave it out")
        if self.quantize is not None and self.shard_size is not None:
            raise ValueError("quantizers choose their own file sizes: leave `shard_size` out")
        return self

    @model_validator(mode="after")
    def _tgi_loads_it(self) -> HfConfig:
        if self.quantize is None or "tgi" not in self.serve:
            return self
        if self.quantize.name in NOT_FOR_TGI:
            raise ValueError(f"TGI does not load {self.quantize.name}: choose awq, gptq, int8 or fp8")
        if self.quantize.name in ("awq", "gptq") and getattr(self.quantize.config, "skip", None):
            raise ValueError("TGI loads awq and gptq with all layers quantized only: leave `skip` out, or `tgi`")
        return self
