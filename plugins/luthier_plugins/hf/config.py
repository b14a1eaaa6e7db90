"""The config of the exporter ``hf``."""

from __future__ import annotations

from typing import Literal

from luthier.api import Config, Field

Target = Literal["vllm", "tgi", "sglang", "tensorrt-llm"]


class HfConfig(Config):
    """A folder of safetensors, compared with the model it came from."""

    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """What the weights are stored as; by default as they are. Weights that do not fit into float16 are refused."""
    shard_size: int = Field(default=2_000_000_000, gt=0)
    """The largest size of one file, in bytes."""
    max_kl: float = Field(default=0.01, gt=0)
    """The largest mean KL divergence to the model it came from, in nats per token."""
    serve: list[Target] = []
    """For each of these programs: the command that starts it, a compose file, and a golden file with a script that
    checks a running server against it."""
