"""The context of components that run outside a recipe: what ``chat`` and ``serve`` make exporters with."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

from luthier.api.artifact import Artifact
from luthier.api.config import Use
from luthier.api.errors import PluginError
from luthier.api.serving import Generator
from luthier.registry import Registry


class AloneContext:
    """A `luthier.api.Context` without a stage: it has no artifacts and no files, and says nothing."""

    stage = ""
    seed = 0
    rank = 0
    world = 1
    device = "cpu"

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._folder = tempfile.TemporaryDirectory()
        self.scratch = Path(self._folder.name)

    def artifact(self, value: str | None) -> Artifact:
        raise PluginError(f"no recipe names the artifact {value!r}: this component runs alone")

    def artifacts(self, values: Sequence[str] | None) -> list[Artifact]:
        return [self.artifact(value) for value in values or []]

    def path(self, value: str) -> Path:
        raise PluginError(f"no recipe names the file {value!r}: this component runs alone")

    def build(self, use: Use) -> Any:
        return self._registry.build(use, self)

    def generator(self, artifact: Artifact, variant: str | None = None) -> AbstractContextManager[Generator[Any]]:
        from luthier.serving.generators import open_generator

        return open_generator(artifact, self._registry, self, variant)

    def collected(self, hook: str) -> Mapping[str, Any]:
        return cast("Mapping[str, Any]", getattr(self._registry, hook)())

    def progress(self, done: int, total: int | None = None, unit: str = "") -> None:
        return None

    def log(self, message: str) -> None:
        return None

    def warn(self, message: str) -> None:
        return None

    def stopping(self) -> bool:
        return False
