"""The quantizer ``torchao``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from luthier.api import Artifact, Facts, Interrupted, Quantizer
from luthier.artifacts.json_files import read_json
from luthier.artifacts.tensors import model_tensors, tensor_headers
from luthier.serving.environments import run_script
from luthier_plugins.quantizers.channels import DTYPES
from luthier_plugins.quantizers.config import TorchaoConfig, TorchaoType
from luthier_plugins.quantizers.layers import check_done, kept_of, layers_of
from luthier_plugins.quantizers.tools import TORCHAO

SCRIPT = Path(__file__).with_name("torchao_script.py")
CLASSES: Mapping[TorchaoType, str] = {
    "int8": "Int8WeightOnlyConfig",
    "int8-dynamic": "Int8DynamicActivationInt8WeightConfig",
    "float8": "Float8WeightOnlyConfig",
}


class Torchao(Quantizer[TorchaoConfig]):
    """torchao's tensors as transformers writes them, made in their own environment.

    Where torchao is installed beside them, peft and trl import it, which makes every start a second slower.
    """

    @property
    def largest_kl(self) -> float:
        return self.config.largest_kl

    def quantize(self, model: Artifact, calibration: Iterable[str], out: Path) -> Facts:
        """Write the weights; no data is needed."""
        context = self.context
        headers = model_tensors(model.path)
        chosen = layers_of(headers, self.config.skip)
        made, job = context.scratch / "torchao", context.scratch / "job.json"
        values = {
            "model": str(model.path),
            "out": str(made),
            "type": CLASSES[self.config.type],
            "skip": ["lm_head", *kept_of(headers, chosen)],
        }
        job.write_text(json.dumps(values), encoding="utf-8")
        for _ in run_script(TORCHAO, SCRIPT, [str(job)], context.scratch / "torchao.log"):
            if context.stopping():
                raise Interrupted("stopped on request")
        for path in made.glob("*.safetensors*"):
            shutil.move(path, out / path.name)
        # Experts in one tensor are not linear layers to torchao: this is where it shows.
        check_done(out, chosen, tensor_headers(out), ("_weight_qdata", "_weight_scale"))
        found: dict[str, Any] = read_json(made / "config.json")
        return {
            "quantization_config": found["quantization_config"],
            "layers": len(chosen),
            "dtype": DTYPES[model.facts["dtype"]],
        }
