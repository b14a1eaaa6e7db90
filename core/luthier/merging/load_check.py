"""Loads a written model the way its users will: transformers loads it, nothing is missing, it computes.

Also a separate program, which begins to import transformers while the merge goes on: importing takes longer than
merging. It starts at once, because nothing is imported here that it does not need.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOM = 0.5
"""The share of the free memory that a model may take for the forward pass."""
TOKENS = 2
"""Tokens in the forward pass: one that attends to another. More only multiply the time (bfloat16 is slow on CPUs)."""


def load_check(folder: Path) -> dict[str, Any]:
    """Load the model with transformers, and let it compute when it fits into memory.

    Returns:
        How it was loaded, or ``problem``.
    """
    try:
        return _load(folder)
    # transformers may raise anything; in any case, the model cannot be loaded.
    except Exception as error:  # noqa: BLE001
        return {"problem": f"{type(error).__name__}: {error}"}


def _load(folder: Path) -> dict[str, Any]:
    import psutil
    import torch
    from transformers import AutoModelForCausalLM

    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    fits = size < ROOM * psutil.virtual_memory().available
    options: dict[str, Any] = {} if fits else {"device_map": "meta"}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", local_files_only=True, output_loading_info=True, **options
    )
    model, info = loaded
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            return {"problem": f"transformers reports {what.replace('_', ' ')}: {sorted(info[what])[:5]}"}
    proof: dict[str, Any] = {"loaded": "memory" if fits else "meta device"}
    if fits:
        rows = model.get_input_embeddings().weight.shape[0]
        with torch.no_grad():
            logits = model(input_ids=torch.arange(min(TOKENS, rows))[None]).logits
        if not bool(torch.isfinite(logits).all()):
            return {"problem": "a forward pass gives NaN or infinite values"}
        proof["forward"] = "finite"
    return proof


def main() -> None:
    """Entry point of ``python -m luthier.merging.load_check``: a folder comes in on stdin, a JSON line goes out."""
    # Nearly all of this process is importing, and what is imported stays: a tenth of the time.
    gc.disable()
    import transformers
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401 - their common code

    transformers.utils.logging.disable_progress_bar()
    folder = sys.stdin.readline().strip()
    # The end of the input without a folder: the merge was given up.
    if folder:
        print(json.dumps(load_check(Path(folder))), flush=True)
    # The libraries' own way out takes most of a second, and the merge waits for this process.
    os._exit(0)


if __name__ == "__main__":
    main()
