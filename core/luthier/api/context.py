"""What a running stage can ask for and report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from luthier.api.artifact import Artifact
from luthier.api.component import Kind
from luthier.api.config import Use


class StageContext(Protocol):
    """A stage's only way to its inputs, its sub-components, its folders and its log.

    Attributes:
        stage: The stage's id in the recipe.
        seed: The seed for everything random.
        out: An empty folder; what is in it when the stage ends becomes the artifact.
        work: A scratch folder that survives a crash; checkpoints go here.
    """

    stage: str
    seed: int
    out: Path
    work: Path

    def input(self, field: str) -> Artifact:
        """The one artifact that a field names, such as ``"model"`` or ``"method.data"``."""
        ...

    def inputs(self, field: str) -> list[Artifact]:
        """All artifacts that a field names; empty when it is unset."""
        ...

    def source(self, field: str) -> Path:
        """The local path of a field that names a file, a folder or a hub model."""
        ...

    def sources(self, field: str) -> list[Path]:
        """The local paths of a field that names several of them."""
        ...

    def component(self, use: Use) -> Any:
        """An instance of a sub-component: its `impl`, made with its config."""
        ...

    def make(self, kind: Kind, name: str) -> Any:
        """An instance of a component with its default config."""
        ...

    def finished(self, path: Path) -> None:
        """Say that a file in `out` is finished: it is hashed now, while the stage may do something else."""
        ...

    def progress(self, done: int, total: int | None = None, unit: str = "") -> None:
        """Report progress. Raises Interrupted when the user asked to stop."""
        ...

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Report metrics of a step, such as the training loss."""
        ...

    def log(self, message: str) -> None:
        """Say what is being done."""
        ...

    def warn(self, message: str) -> None:
        """Say what looks wrong but does not stop the stage; kept in the manifest."""
        ...

    def stopping(self) -> bool:
        """Whether the user asked to stop: checkpoint, then raise Interrupted."""
        ...
