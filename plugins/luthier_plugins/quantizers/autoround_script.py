"""Runs in the environment of auto-round: quantizes a model folder.

    python autoround_script.py JOB.json

The job has ``model``, ``out``, ``format``, ``bits``, ``group_size``, ``symmetric``, ``iterations``, ``ids``
(token ids of texts) and ``skip`` (names of layers).
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

LONGEST = 512
FEWEST = 8
"""Rows at least: a batch."""


def main() -> None:
    """Quantize what the job says."""
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    model: Any = AutoModelForCausalLM.from_pretrained(job["model"], local_files_only=True, dtype="auto")
    tokenizer: Any = AutoTokenizer.from_pretrained(job["model"], local_files_only=True)
    rows: Any = _of_one_length([token for block in job["ids"] for token in block])
    # It exists in the environment that this runs in, not in Luthier's.
    worker: Any = import_module("auto_round").AutoRound(
        model,
        tokenizer,
        bits=job["bits"],
        group_size=job["group_size"],
        sym=job["symmetric"],
        iters=job["iterations"],
        dataset=DataLoader(rows, batch_size=1),
        seqlen=len(rows[0]["input_ids"]),
        nsamples=len(rows),
        batch_size=min(8, len(rows)),
        device_map="auto" if _cuda() else "cpu",
        enable_torch_compile=False,
        layer_config={name: {"bits": 16} for name in job["skip"]},
    )
    worker.quantize_and_save(job["out"], format=job["format"])


def _of_one_length(ids: list[int]) -> list[dict[str, Any]]:
    """The tokens cut into rows that are equally long, as auto-round wants them; a rest is left out."""
    import torch

    length = max(1, min(LONGEST, len(ids) // FEWEST))
    cut = [ids[first : first + length] for first in range(0, len(ids) - length + 1, length)]
    return [{"input_ids": torch.tensor(row), "attention_mask": torch.ones(length, dtype=torch.long)} for row in cut]


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
