"""The quantizers ``int8`` and ``fp8``: a scale for each output of a layer, in compressed-tensors' layout."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from luthier.api import Artifact, Facts, ModelError, Quantizer
from luthier.artifacts.tensors import model_tensors, tensor_headers
from luthier.modeling.shards import ShardWriter, tensors_of
from luthier_plugins.quantizers.layers import check_done, kept_of, layers_of
from torch import Tensor

SHARD = 2_000_000_000
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class _Channels(Quantizer[Any]):
    """What both have in common."""

    kind: ClassVar[str]
    form: ClassVar[str]
    dtype: ClassVar[torch.dtype]
    top: ClassVar[float]

    @property
    def largest_kl(self) -> float:
        return self.config.largest_kl

    def quantize(self, model: Artifact, calibration: Iterable[str], out: Path) -> Facts:
        """Write the weights; no data is needed."""
        headers = model_tensors(model.path)
        chosen = layers_of(headers, self.config.skip)
        name_of = DTYPES[model.facts["dtype"]]
        dtype: torch.dtype = getattr(torch, name_of)
        writer = ShardWriter(out, SHARD)
        quantized = set(chosen)
        for place, (name, tensor) in enumerate(tensors_of(model.path), 1):
            if not bool(torch.isfinite(tensor).all()):
                raise ModelError("the tensor has NaN or infinite values", where=name)
            if name in quantized:
                values, scale = self.rounded(tensor.float())
                writer.add(name, values)
                writer.add(f"{name}_scale", scale)
            else:
                writer.add(name, tensor.to(dtype) if tensor.is_floating_point() else tensor)
            self.context.progress(place, len(headers), "tensors")
        writer.close()
        check_done(out, chosen, tensor_headers(out), ("weight", "weight_scale"))
        return {
            "quantization_config": self._settings(kept_of(headers, chosen)),
            "layers": len(chosen),
            "dtype": name_of,
        }

    def rounded(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Weights in 8 bits, and the scale of each output, float32 of shape (rows, 1)."""
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / self.top
        scaled = weight / scale
        return (scaled.round() if self.kind == "int" else scaled).clamp(-self.top, self.top).to(self.dtype), scale

    def _settings(self, kept: list[str]) -> dict[str, Any]:
        weights = {"num_bits": 8, "type": self.kind, "symmetric": True, "strategy": "channel", "dynamic": False}
        activations = {"num_bits": 8, "type": self.kind, "symmetric": True, "strategy": "token", "dynamic": True}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
        return {
            "quant_method": "compressed-tensors",
            "format": self.form,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head", *kept],
        }


class Int8(_Channels):
    """Integers from -127 to 127."""

    kind = "int"
    form = "int-quantized"
    dtype = torch.int8
    top = 127.0


class Fp8(_Channels):
    """Floats with 4 bits of exponent and 3 of mantissa."""

    kind = "float"
    form = "float-quantized"
    dtype = torch.float8_e4m3fn
    top = 448.0
