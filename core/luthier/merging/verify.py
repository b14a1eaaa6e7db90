"""Checks a written model: the index against the files, and whether transformers loads it.

Where transformers is not loaded yet, the check is a separate process, see `luthier.merging.load_check`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from luthier.api import Facts, ModelError
from luthier.artifacts.models import check_model_folder
from luthier.artifacts.tensors import stray_files
from luthier.merging.load_check import load_check


class Verifier:
    """Looks at a model once it is written; a context manager around the process that does so, where there is one.

    Args:
        folder: The model that will be checked.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # A file, because a library that writes much would block on a pipe without a reader.
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - closed when the verifier is
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Verifier:
        if "transformers" in sys.modules:
            return self
        self._process = subprocess.Popen(
            [sys.executable, "-m", "luthier.merging.load_check"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
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
        """Whether a separate process is getting ready for the check."""
        return self._process is not None

    def verdict(self, meanwhile: Callable[[], None] = lambda: None) -> Facts:
        """What the check of the finished folder found.

        Args:
            meanwhile: What to do while the other process looks.

        Raises:
            ModelError: the model is not what it should be.
        """
        check_index(self.folder)
        if self._process is None:
            found = load_check(self.folder)
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
            return {
                "problem": f"signal {-process.returncode} ended the process that checked it (often the sign of "
                "too little memory)"
            }
        self._log.seek(0)
        return {"problem": self._log.read().strip().rpartition("\n")[2]}


def check_index(folder: Path) -> None:
    """The files are those that the index names, with the tensors that it names, and there are no others.

    Raises:
        ModelError: it does not.
    """
    check_model_folder(folder)
    stray = stray_files(folder)
    if stray:
        raise ModelError(f"the weights files {', '.join(stray)} do not belong to it", where=str(folder))
