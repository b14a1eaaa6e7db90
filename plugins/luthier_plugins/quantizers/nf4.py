"""The quantizer ``nf4``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from luthier.api import Artifact, Facts, Quantizer
from luthier.artifacts.tensors import model_tensors, tensor_headers
from luthier_plugins.quantizers.config import Nf4Config
from luthier_plugins.quantizers.layers import check_done, layers_of


class Nf4(Quantizer[Nf4Config]):
    """bitsandbytes quantizes while transformers loads, and transformers writes what it has."""

    @property
    def largest_kl(self) -> float:
        return self.config.largest_kl

    def quantize(self, model: Artifact, calibration: Iterable[str], out: Path) -> Facts:
        """Write the weights; no data is needed."""
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=self.config.double,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model.path, quantization_config=settings, dtype=torch.bfloat16, local_files_only=True
        )
        loaded.save_pretrained(out)
        written = tensor_headers(out)
        quantized = layers_of(model_tensors(model.path), [])
        check_done(out, quantized, written, ("weight.quant_state.bitsandbytes__nf4",))
        found: dict[str, Any] = json.loads((out / "config.json").read_text(encoding="utf-8"))
        return {"quantization_config": found["quantization_config"], "layers": len(quantized), "dtype": "bfloat16"}
