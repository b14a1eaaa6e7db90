"""Runs workers as child processes on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from luthier.api import Executor, ProcessSession, Slot
from luthier_plugins.local.config import LocalConfig


class Local(Executor[LocalConfig]):
    """The executor ``local``."""

    def slots(self) -> Sequence[Slot]:
        if self.config.gpus is not None:
            return [Slot(f"slot-{place}", tuple(gpus)) for place, gpus in enumerate(self.config.gpus)]
        if self.config.slots == 1:
            return [Slot("local", all_gpus=True)]
        return [Slot(f"slot-{place}") for place in range(self.config.slots)]

    def open(self, slot: Slot, log: Path) -> ProcessSession:
        return ProcessSession(self.context.worker.on(slot), log)
