"""Looks at a written model the way its users will: transformers loads it, nothing is missing, it computes.

Where transformers is not loaded yet, this runs in a process of its own that begins to import it while the merge goes
on: importing takes longer than merging.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from luthier.api import Facts, ModelError
from luthier.artifacts.models import check_model_folder, read_json

INDEX = "model.safetensors.index.json"
ROOM = 0.5
"""The share of the free memory that a model may take for the forward pass."""
TOKENS = 2
"""Tokens in the forward pass: one that attends to another. More only multiply the time (bfloat16 is slow on CPUs)."""


class Verifier:
    """Looks at a model once it is written; a context manager around the process that does so, where there is one.

    Args:
        folder: The model that will be looked at.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # A file, because a pipe that nobody reads would stop a library that has much to say.
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - closed when the verifier is
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Verifier:
        if "transformers" in sys.modules:
            return self
        self._process = subprocess.Popen(
            [sys.executable, "-m", "luthier_plugins.merge.verify"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._log.close()

    @property
    def apart(self) -> bool:
        """Whether a process of its own is getting ready for the look."""
        return self._process is not None

    def verdict(self, meanwhile: Callable[[], None] = lambda: None) -> Facts:
        """What the look at the finished folder showed.

        Args:
            meanwhile: What to do while the other process looks.

        Raises:
            ModelError: the model is not what it should be.
        """
        check_index(self.folder)
        if self._process is None:
            found = _looked(self.folder)
            meanwhile()
        else:
            found = self._asked(self._process, meanwhile)
        if "problem" in found:
            raise ModelError(
                f"the written model is not sound: {found['problem']}",
                where=str(self.folder),
                hint="nothing was stored; do the models themselves load with transformers?",
            )
        return found

    def _asked(self, process: subprocess.Popen[str], meanwhile: Callable[[], None]) -> Facts:
        """What the other process finds."""
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.write(f"{self.folder}\n")
            process.stdin.flush()
        meanwhile()
        out, _ = process.communicate()
        found: dict[str, Any] = json.loads(out.strip().rpartition("\n")[2] or "{}")
        if found:
            return found
        if process.returncode < 0:
            return {"problem": f"signal {-process.returncode} ended the process that looked at it (often the sign of "
                               "too little memory)"}  # fmt: skip
        self._log.seek(0)
        return {"problem": self._log.read().strip().rpartition("\n")[2]}


def check_index(folder: Path) -> None:
    """The index names exactly the tensors that the files have, and there are no other files.

    Raises:
        ModelError: it does not.
    """
    check_model_folder(folder)
    files = {path.name for path in folder.glob("*.safetensors")}
    index = folder / INDEX
    named = set(read_json(index)["weight_map"].values()) if index.exists() else {"model.safetensors"}
    if files != named:
        raise ModelError(f"the weights files {sorted(files ^ named)} do not fit the index", where=str(folder))


def look(folder: Path) -> Facts:
    """Load the model with transformers, and let it compute when it fits into memory.

    Returns:
        What was looked at, or ``problem``.
    """
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
    proof: Facts = {"loaded": "memory" if fits else "meta device"}
    if fits:
        rows = model.get_input_embeddings().weight.shape[0]
        with torch.no_grad():
            logits = model(input_ids=torch.arange(min(TOKENS, rows))[None]).logits
        if not bool(torch.isfinite(logits).all()):
            return {"problem": "a forward pass gives NaN or infinite values"}
        proof["forward"] = "finite"
    return proof


def _looked(folder: Path) -> Facts:
    try:
        return look(folder)
    # transformers raises what it likes; whatever it is, the model cannot be loaded.
    except Exception as error:  # noqa: BLE001
        return {"problem": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Entry point of ``python -m luthier_plugins.merge.verify``: a folder in, a JSON line out."""
    # Nearly all of this process is importing, and what is imported stays: a tenth of the time.
    gc.disable()
    # transformers would import it for the losses of object detection alone.
    sys.modules.setdefault("scipy", None)  # type: ignore[arg-type]
    import torch  # noqa: F401 - loaded while the merge goes on
    import transformers
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    transformers.utils.logging.disable_progress_bar()
    folder = sys.stdin.readline().strip()
    # The end of the input without a folder: the merge was given up.
    if folder:
        print(json.dumps(_looked(Path(folder))), flush=True)
    # The libraries' own way out takes most of a second, and the merge waits for this process.
    os._exit(0)


if __name__ == "__main__":
    main()
