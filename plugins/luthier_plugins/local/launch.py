"""Starts the worker as a child process."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from luthier_plugins.local.config import LocalConfig


class Local:
    """Runs the worker here, in a session of its own, so that Ctrl-C reaches only the runner."""

    def __init__(self, config: LocalConfig) -> None:
        self.config = config

    def launch(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[str]:
        with log.open("a", encoding="utf-8") as errors:
            return subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=dict(environment),
                text=True,
                encoding="utf-8",
                start_new_session=True,
            )
