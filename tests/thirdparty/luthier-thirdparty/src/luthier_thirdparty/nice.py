"""An executor that runs workers under ``nice`` on two slots."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from luthier.api import Executor, ProcessSession, Slot

from luthier_thirdparty.config import NiceConfig


class Nice(Executor[NiceConfig]):
    """Child processes of this machine."""

    def slots(self) -> Sequence[Slot]:
        return [Slot(f"nice-{place}") for place in range(self.config.slots)]

    def open(self, slot: Slot, log: Path) -> ProcessSession:
        launch = self.context.worker.on(slot)
        command = ["nice", "-n", str(self.config.niceness), *launch.command]
        return ProcessSession(replace(launch, command=command), log)
