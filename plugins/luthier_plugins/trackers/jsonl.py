"""The tracker ``jsonl``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from luthier_plugins.trackers.config import JsonlConfig


class Jsonl:
    """One JSON object a step: the step and its metrics."""

    def __init__(self, config: JsonlConfig) -> None:
        self._file: TextIO | None = None

    def start(self, folder: Path, stage: str) -> None:
        path = folder / "metrics" / f"{stage}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        assert self._file is not None, "a tracker is started before it logs"
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def finish(self) -> None:
        if self._file is not None:
            self._file.close()
