"""The context of components that run outside a recipe: what ``chat`` and ``serve`` make exporters with."""

from __future__ import annotations

import datetime
import tempfile
from pathlib import Path

from luthier.api.artifact import Artifact
from luthier.api.errors import PluginError
from luthier.registry import Registry
from luthier.serving.access import PluginAccess


class AloneContext(PluginAccess):
    """A `luthier.api.Context` without a stage: it has no artifacts and no files, and says nothing."""

    stage = ""
    seed = 0
    rank = 0
    world = 1
    device = "cpu"

    def __init__(self, registry: Registry) -> None:
        super().__init__(registry)
        # Who chats today is told today's date, as by other servers.
        self.date: datetime.date | None = datetime.date.today()
        self._folder = tempfile.TemporaryDirectory()
        self.scratch = Path(self._folder.name)
        self.cache = self.scratch / "cache"

    def artifact(self, value: str | None) -> Artifact:
        raise PluginError(f"no recipe names the artifact {value!r}: this component runs alone")

    def path(self, value: str) -> Path:
        raise PluginError(f"no recipe names the file {value!r}: this component runs alone")

    def progress(self, done: int, total: int | None = None, unit: str = "") -> None:
        return None

    def log(self, message: str) -> None:
        return None

    def warn(self, message: str) -> None:
        return None

    def stopping(self) -> bool:
        return False
