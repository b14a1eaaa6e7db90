"""Runs in the environment of torchao: quantizes a model folder.

    python torchao_script.py JOB.json

The job has ``model``, ``out``, ``type`` (the name of a config class of torchao) and ``skip`` (names of layers).
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def main() -> None:
    """Quantize what the job says: torchao does while transformers loads, and transformers writes what it has."""
    from transformers import AutoModelForCausalLM, TorchAoConfig

    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    # It exists in the environment that this runs in, not in Luthier's.
    chosen: Any = getattr(import_module("torchao.quantization"), job["type"])()
    settings: Any = TorchAoConfig(quant_type=chosen, modules_to_not_convert=job["skip"])
    model: Any = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype="auto", quantization_config=settings, local_files_only=True
    )
    model.save_pretrained(job["out"])


if __name__ == "__main__":
    main()
