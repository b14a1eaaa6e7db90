"""The quantizers ``awq`` and ``gptq``: whole numbers with a scale for each group of inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import torch
from luthier.api import Artifact, DataError, Facts, ModelError, StageContext
from luthier.artifacts.models import tensor_headers
from luthier.train.calibration import blocks_of, digest_of
from luthier.train.loading import load_model, load_tokenizer
from luthier.train.packed import Grouped, to_awq, to_gptq
from luthier.train.shards import ShardWriter
from luthier_plugins.quantizers.config import AwqConfig, GptqConfig
from luthier_plugins.quantizers.layers import EXPERT, check_divisible, check_done, layers_of
from luthier_plugins.quantizers.rounding import Grid, rounded_on_data, to_nearest
from safetensors import safe_open
from torch import Tensor

TOKENS = 16_384
"""How much calibration data is looked at, where there is as much."""
BLOCK = 512
SHARD = 2_000_000_000
WORD = 32


class _Grouped(ABC):
    """What both layouts have in common."""

    layout: ClassVar[Callable[[Grouped], dict[str, Tensor]]]

    def __init__(self, config: AwqConfig | GptqConfig) -> None:
        self.config = config
        self.grid = Grid(config.bits, config.group_size, config.symmetric)
        self.largest_kl = config.largest_kl

    def quantize(self, model: Artifact, calibration: Iterable[str], out: Path, context: StageContext) -> Facts:
        """Write the weights; the facts have ``quantization_config``, ``layers`` and ``calibration``."""
        headers = tensor_headers(model.path)
        chosen = layers_of(headers, self.config.skip)
        check_divisible(headers, chosen, self.config.group_size, WORD // self.config.bits)
        settings = self._settings(chosen, list(headers))
        facts: Facts = {"quantization_config": settings, "layers": len(chosen), "dtype": "float16"}
        made: dict[str, dict[str, Tensor]] = {}
        dense = [name for name in chosen if not EXPERT.search(name)]
        if self.config.rounding == "gptq" and dense:
            blocks = self._blocks(model, calibration)
            facts["calibration"] = digest_of(blocks)
            loaded = load_model(model).eval()
            for name, matrix in rounded_on_data(loaded, dense, blocks, self.grid, lambda done, total:
                                                context.progress(done, total, "layers")):  # fmt: skip
                made[name] = type(self).layout(matrix)
            del loaded
        writer = ShardWriter(out, SHARD)
        with ExitStack() as stack:
            files: dict[str, Any] = {file: stack.enter_context(safe_open(model.path / file, framework="pt"))
                                     for file in {header.file for header in headers.values()}}  # fmt: skip
            for place, (name, header) in enumerate(headers.items(), 1):
                tensor: Tensor = files[header.file].get_tensor(name)
                if not bool(torch.isfinite(tensor).all()):
                    raise ModelError("the tensor has NaN or infinite values", where=name)
                if name in chosen:
                    packed = made.pop(name, None) or type(self).layout(to_nearest(tensor.float(), self.grid))
                    for part, value in packed.items():
                        writer.add(f"{name.removesuffix('.weight')}.{part}", value)
                else:
                    # The kernels compute in float16.
                    writer.add(name, tensor.half())
                context.progress(place, len(headers), "tensors")
        writer.close()
        check_done(out, chosen, tensor_headers(out), ("qweight", "qzeros", "scales"))
        return facts

    def _blocks(self, model: Artifact, calibration: Iterable[str]) -> list[list[int]]:
        try:
            return blocks_of(iter(calibration), load_tokenizer(model), TOKENS, BLOCK)
        except DataError as error:
            raise DataError(
                f"{error.message}, and rounding as GPTQ does looks at data",
                hint="name a dataset as `calibration`, or set `rounding: nearest`",
            ) from error

    @abstractmethod
    def _settings(self, chosen: list[str], names: list[str]) -> dict[str, Any]:
        """What ``config.json`` says of it."""


def _kept(chosen: list[str], names: list[str]) -> list[str]:
    """The linear layers that were skipped."""
    quantized = set(chosen)
    return [name.removesuffix(".weight") for name in names
            if name.endswith("proj.weight") and name not in quantized]  # fmt: skip


class Awq(_Grouped):
    """AutoAWQ's ``gemm`` layout."""

    layout = staticmethod(to_awq)

    def _settings(self, chosen: list[str], names: list[str]) -> dict[str, Any]:
        return {"quant_method": "awq", "bits": 4, "group_size": self.config.group_size, "version": "gemm",
                "zero_point": True, "modules_to_not_convert": _kept(chosen, names) or None}  # fmt: skip


class Gptq(_Grouped):
    """GPTQ's layout, version 1."""

    layout = staticmethod(to_gptq)

    def _settings(self, chosen: list[str], names: list[str]) -> dict[str, Any]:
        found: dict[str, Any] = {
            "quant_method": "gptq", "bits": self.config.bits, "group_size": self.config.group_size,
            "sym": self.config.symmetric, "desc_act": False, "checkpoint_format": "gptq", "damp_percent": 0.01,
        }  # fmt: skip
        kept = _kept(chosen, names)
        # The form in which GPTQModel and vLLM take exceptions.
        return found | ({"dynamic": {f"-:^{name}$": {} for name in kept}} if kept else {})
