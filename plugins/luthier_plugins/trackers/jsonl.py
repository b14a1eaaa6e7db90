"""The tracker ``jsonl``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from luthier.api import Context, Outcome, RunInfo, Tracker
from luthier_plugins.trackers.config import JsonlConfig


class Jsonl(Tracker[JsonlConfig]):
    """One JSON object per step, with the step and its metrics; a resumed stage appends to its file."""

    def __init__(self, config: JsonlConfig, context: Context) -> None:
        super().__init__(config, context)
        self._file: TextIO | None = None
        self._run: RunInfo | None = None

    def start(self, run: RunInfo) -> None:
        self._run = run
        self._describe({"outcome": "running"})
        path = run.folder / "metrics.jsonl"
        kept = _until(path, run.step) if run.resumed else ""
        self._file = path.open("w", encoding="utf-8", buffering=1)
        self._file.write(kept)

    def log(self, values: Mapping[str, float], step: int) -> None:
        assert self._file is not None, "a tracker is started before it logs"
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def finish(self, outcome: Outcome, facts: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.close()
        self._describe({"outcome": outcome, "facts": dict(facts)})

    def _describe(self, ending: Mapping[str, Any]) -> None:
        assert self._run is not None, "a tracker is started before it is finished"
        about = {**asdict(self._run), "folder": str(self._run.folder), **ending}
        (self._run.folder / "run.json").write_text(json.dumps(about, indent=2), encoding="utf-8")


def _until(path: Path, step: int) -> str:
    """The lines of a file up to a step; a last line that was cut short is dropped."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step)
