"""The quantizers ``awq`` and ``gptq``: whole numbers with a scale for each group of inputs."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from luthier.api import Artifact, Context, DataError, Facts, Interrupted, ModelError, Quantizer
from luthier.artifacts.tensors import model_tensors, tensor_headers
from luthier.modeling.calibration import blocks_of, digest_of
from luthier.modeling.loading import load_tokenizer
from luthier.modeling.quantized import Grouped, to_awq, to_gptq
from luthier.modeling.shards import ShardWriter, tensors_of
from luthier.modeling.streamed import Streamed
from luthier.serving.environments import python_of, run_script
from luthier_plugins.quantizers.config import AwqConfig, GptqConfig
from luthier_plugins.quantizers.layers import EXPERT, check_divisible, check_done, kept_of, layers_of
from luthier_plugins.quantizers.rounding import Grid, round_on_data, to_nearest
from luthier_plugins.quantizers.tools import AUTO_ROUND
from safetensors import safe_open
from torch import Tensor

TOKENS = 16_384
"""How much calibration data is used, where there is as much."""
BLOCK = 512
SCRIPT = Path(__file__).with_name("autoround_script.py")
SHARD = 2_000_000_000
WORD = 32


class _Grouped(Quantizer[Any], ABC):
    """What both layouts have in common."""

    name: ClassVar[str]
    layout: ClassVar[Callable[[Grouped], dict[str, Tensor]]]

    def __init__(self, config: AwqConfig | GptqConfig, context: Context) -> None:
        super().__init__(config, context)
        self.grid = Grid(config.bits, config.group_size, config.symmetric)

    @property
    def largest_kl(self) -> float:
        return self.config.largest_kl

    def quantize(self, model: Artifact, calibration: Iterable[str], out: Path) -> Facts:
        """Write the weights; the facts have ``quantization_config``, ``layers`` and ``calibration``."""
        headers = model_tensors(model.path)
        chosen = layers_of(headers, self.config.skip)
        check_divisible(headers, chosen, self.config.group_size, WORD // self.config.bits)
        settings = self._settings(chosen, kept_of(headers, chosen))
        facts: Facts = {"quantization_config": settings, "layers": len(chosen), "dtype": "float16"}
        # Before anything is computed with it.
        for name, tensor in tensors_of(model.path):
            in_half(tensor, name)
        if self.config.rounding == "auto-round":
            return facts | self._by_auto_round(model, calibration, chosen, out)
        made: dict[str, dict[str, Tensor]] = {}
        dense = [name for name in chosen if not EXPERT.search(name)]
        if self.config.rounding == "gptq" and dense:
            blocks = self._blocks(model, calibration)
            facts["calibration"] = digest_of(blocks)

            def take(name: str, matrix: Grouped) -> None:
                made[name] = type(self).layout(matrix)

            round_on_data(
                Streamed(model.path),
                dense,
                blocks,
                self.grid,
                take,
                lambda done, total: self.context.progress(done, total, "layers"),
            )
        writer = ShardWriter(out, SHARD)
        quantized = set(chosen)
        for place, (name, tensor) in enumerate(tensors_of(model.path), 1):
            if name in quantized:
                in_half(tensor, name)
                packed = made.pop(name, None) or type(self).layout(to_nearest(tensor.float(), self.grid))
                for part, value in packed.items():
                    writer.add(f"{name.removesuffix('.weight')}.{part}", value)
            else:
                writer.add(name, in_half(tensor, name))
            self.context.progress(place, len(headers), "tensors")
        writer.close()
        check_done(out, chosen, tensor_headers(out), ("qweight", "qzeros", "scales"))
        return facts

    def _by_auto_round(self, model: Artifact, calibration: Iterable[str], chosen: list[str], out: Path) -> Facts:
        """Have auto-round write the weights, in its own environment."""
        context = self.context
        # Before anything is computed: it may not be there.
        _ = python_of(AUTO_ROUND)
        blocks = self._blocks(model, calibration)
        headers = model_tensors(model.path)
        made, job = context.scratch / "auto-round", context.scratch / "job.json"
        values = {
            "model": str(model.path),
            "out": str(made),
            "format": f"auto_{self.name}",
            "bits": self.config.bits,
            "group_size": self.config.group_size,
            "symmetric": self.config.symmetric,
            "iterations": self.config.iterations,
            "ids": blocks,
            "skip": kept_of(headers, chosen),
        }
        job.write_text(json.dumps(values), encoding="utf-8")
        done = 0
        for line in run_script(AUTO_ROUND, SCRIPT, [str(job)], context.scratch / "auto-round.log"):
            if "quantized " in line:
                done += 1
                context.progress(done, None, "blocks")
            if context.stopping():
                raise Interrupted("stopped on request")
        files = sorted(made.rglob("*.safetensors"))
        writer = ShardWriter(out, SHARD)
        for path in files:
            with safe_open(path, framework="pt") as opened:
                file: Any = opened
                for name in file.keys():  # noqa: SIM118 - it is not a mapping
                    tensor: Tensor = file.get_tensor(name)
                    writer.add(name, in_half(tensor, name))
        writer.close()
        check_done(out, chosen, tensor_headers(out), ("qweight", "qzeros", "scales"))
        return {"calibration": digest_of(blocks)}

    def _blocks(self, model: Artifact, calibration: Iterable[str]) -> list[list[int]]:
        try:
            return blocks_of(iter(calibration), load_tokenizer(model), TOKENS, BLOCK)
        except DataError as error:
            raise DataError(
                f"{error.message}, and GPTQ rounding needs data",
                hint="name a dataset as `calibration`, or set `rounding: nearest`",
            ) from error

    @abstractmethod
    def _settings(self, chosen: list[str], kept: list[str]) -> dict[str, Any]:
        """What ``config.json`` says of it."""


def in_half(tensor: Tensor, name: str) -> Tensor:
    """A tensor in float16, in which the kernels compute.

    Raises:
        ModelError: a value is not finite, or too large.
    """
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    if not bool(torch.isfinite(half).all()):
        odd = "has NaN or infinite values" if not bool(torch.isfinite(tensor).all()) else "does not fit into float16"
        raise ModelError(f"the tensor {odd}", where=name, hint="this layout computes in float16: export another one")
    return half


class Awq(_Grouped):
    """AutoAWQ's ``gemm`` layout."""

    name = "awq"
    layout = staticmethod(to_awq)

    def _settings(self, chosen: list[str], kept: list[str]) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": self.config.group_size,
            "version": "gemm",
            "zero_point": True,
            "modules_to_not_convert": kept or None,
        }


class Gptq(_Grouped):
    """GPTQ's layout, version 1."""

    name = "gptq"
    layout = staticmethod(to_gptq)

    def _settings(self, chosen: list[str], kept: list[str]) -> dict[str, Any]:
        found: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": self.config.bits,
            "group_size": self.config.group_size,
            "sym": self.config.symmetric,
            "desc_act": False,
            "checkpoint_format": "gptq",
            "damp_percent": 0.01,
        }
        # Three forms: GPTQModel and vLLM take exceptions by pattern, optimum in transformers wants the layers that are
        # none, others take exceptions by name.
        names = {
            "dynamic": {f"-:^{name}$": {} for name in kept},
            "modules_to_not_convert": kept,
            "modules_in_block_to_quantize": [[name.removesuffix(".weight") for name in chosen]],
        }
        return found | (names if kept else {})
