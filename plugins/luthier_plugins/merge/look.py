"""Looks at a written model the way its users will: transformers loads it, nothing is missing, it computes.

Also a program of its own, which begins to import transformers while the merge goes on: importing takes longer than
merging. It starts at once, because nothing is imported here that it does not need.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from luthier_plugins.merge.lean import import_transformers

ROOM = 0.5
"""The share of the free memory that a model may take for the forward pass."""
ALL = "all"
TOKENS = 2
"""Tokens in the forward pass: one that attends to another. More only multiply the time (bfloat16 is slow on CPUs)."""


def looked(folder: Path) -> dict[str, Any]:
    """Load the model with transformers, and let it compute when it fits into memory.

    Returns:
        What was looked at, or ``problem``.
    """
    try:
        return _look(folder)
    # transformers raises what it likes; whatever it is, the model cannot be loaded.
    except Exception as error:  # noqa: BLE001
        return {"problem": f"{type(error).__name__}: {error}"}


def _look(folder: Path) -> dict[str, Any]:
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
    """Entry point of ``python -m luthier_plugins.merge.look [all [FOLDER]]``: a folder in, a JSON line out.

    The folder comes in on stdin, so that transformers is imported while the merge goes on; or it is an argument.
    """
    # Nearly all of this process is importing, and what is imported stays: a tenth of the time.
    gc.disable()
    lean = sys.argv[1:2] != [ALL]
    try:
        transformers = import_transformers() if lean else import_module("transformers")
    # Whatever another version of the libraries needs that is left out.
    except Exception:
        if lean:
            _again()
        raise
    transformers.utils.logging.disable_progress_bar()
    folder = sys.argv[2] if len(sys.argv) > 2 else sys.stdin.readline().strip()
    # The end of the input without a folder: the merge was given up.
    if folder:
        found = looked(Path(folder))
        if lean and "problem" in found:
            _again(folder)
        print(json.dumps(found), flush=True)
    # The libraries' own way out takes most of a second, and the merge waits for this process.
    os._exit(0)


def _again(*folder: str) -> NoReturn:
    """Begin once more with all of transformers: what a lean import leaves out must not be what a model fails for.

    It is the same process, for who stops it, and its input has not been read further than its folder.
    """
    os.execv(sys.executable, [sys.executable, "-m", "luthier_plugins.merge.look", ALL, *folder])


if __name__ == "__main__":
    main()
