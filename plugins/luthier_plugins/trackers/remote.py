"""What trackers share that hand metrics to a service of its own."""

from __future__ import annotations

import re
import secrets
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from luthier.api import Config, Context, Outcome, RunInfo, Tracker
from luthier.artifacts.json_files import read_json, write_json

C = TypeVar("C", bound=Config)


class RemoteTracker(Tracker[C]):
    """A tracker whose service has runs with names of their own: a stage that is resumed goes on in the same one. A run
    begins with the first metrics, or with a failure: most stages have none to show.

    What was logged before the stage was killed, after the checkpoint that it goes on from, is not logged again.
    """

    def __init__(self, config: C, context: Context) -> None:
        super().__init__(config, context)
        self._file: Path | None = None
        self._run_info: RunInfo | None = None
        self._name: str | None = None
        self._opened = False
        self._logged = -1
        self._known = -1

    def start(self, run: RunInfo) -> None:
        self._file = run.folder / f"{type(self).__name__.lower()}.json"
        known: dict[str, Any] = read_json(self._file) if run.resumed and self._file.exists() else {}
        self._known = self._logged = known.get("step", -1)
        self._run_info, self._name = run, known.get("run")

    def log(self, values: Mapping[str, float], step: int) -> None:
        if step <= self._known:
            return
        self._open()
        self.send(values, step)
        if step > self._logged:
            self._logged = step
            self._keep()

    def finish(self, outcome: Outcome, facts: Mapping[str, Any]) -> None:
        if self._name is not None or outcome == "failed":
            self._open()
        if self._opened:
            self.close(outcome, numbers_in(facts.get("training", facts)))

    def _open(self) -> None:
        if self._opened:
            return
        assert self._run_info is not None, "a tracker is started before it logs"
        self._name = self.open(self._run_info, self._name)
        self._opened = True
        self._keep()

    def _keep(self) -> None:
        assert self._file is not None, "a tracker is started before it logs"
        write_json(self._file, {"run": self._name, "step": self._logged})

    @abstractmethod
    def open(self, run: RunInfo, name: str | None) -> str:
        """Begin a run, or go on with the one of a name; gives its name."""

    @abstractmethod
    def send(self, values: Mapping[str, float], step: int) -> None:
        """Log metrics of a step."""

    @abstractmethod
    def close(self, outcome: Outcome, summary: Mapping[str, float]) -> None:
        """End the run, with numbers that sum it up."""


def fresh_name(run: RunInfo) -> str:
    """A name for a run that no other has."""
    return f"{re.sub('[^A-Za-z0-9_.-]+', '-', run.stage)}-{run.key[:8]}-{secrets.token_hex(3)}"


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested values under names with dots."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = f"{before}{name}"
        found |= flat(value, f"{inner}.") if isinstance(value, Mapping) else {inner: value}
    return found


def numbers_in(facts: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among facts, under names with dots."""
    return {
        name: float(value)
        for name, value in flat(facts).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
