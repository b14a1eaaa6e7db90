"""What a running component can ask for and report."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from luthier.api.artifact import Artifact

if TYPE_CHECKING:
    from luthier.api.config import Use
    from luthier.api.serving import Generator


class Context(Protocol):
    """A component's only access to its surroundings, wherever it appears in a recipe.

    Artifacts and files are asked for by the value of the config field that names them: `context.artifact(config.data)`.

    On a rank other than 0, `log`, `warn`, `progress` and `metrics` say nothing, and a stage's `out` cannot be had: rank
    0 alone writes and reports.

    Attributes:
        stage: The stage's id in the recipe.
        seed: The seed for everything random.
        date: The day that the recipe names, for chat templates that ask for it; None where it names none.
        scratch: A folder that survives a crash; checkpoints go here.
        cache: A folder that all stages of a store share, for what can be made again, such as tokens: each thing under
            a key of what it is made from.
        rank: Which of the processes that compute the stage together this is, from 0.
        world: How many there are.
    """

    stage: str
    seed: int
    date: datetime.date | None
    scratch: Path
    cache: Path
    rank: int
    world: int

    @property
    def device(self) -> str:
        """What to compute on: ``cuda`` (with the rank's number, where there are several) or ``cpu``."""
        ...

    def artifact(self, value: str | None) -> Artifact:
        """The artifact that a config field names, by the field's value.

        Raises:
            PluginError: no field of the stage's config that is marked as an input has this value.
        """
        ...

    def artifacts(self, values: Sequence[str] | None) -> list[Artifact]:
        """The artifacts of a field that names several; none when it is unset."""
        ...

    def path(self, value: str) -> Path:
        """The local path of a field that names a file, a folder or a hub model, by the field's value.

        Raises:
            PluginError: no field of the stage's config that is marked as a source has this value.
        """
        ...

    def build(self, use: Use) -> Any:
        """An instance of a sub-component: its `impl`, made with its config and this context."""
        ...

    def generator(self, artifact: Artifact, variant: str | None = None) -> AbstractContextManager[Generator[Any]]:
        """A model, an adapter or an export to ask: the latter in the program that it is made for."""
        ...

    def collected(self, hook: str) -> Mapping[str, Any]:
        """What plugins provide by name: ``gguf_architectures`` or ``tool_environments``."""
        ...

    def progress(self, done: int, total: int | None = None, unit: str = "") -> None:
        """Report progress. Raises Interrupted when the user asked to stop."""
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


class StageContext(Context, Protocol):
    """What a stage has beside: a place for its artifact.

    Attributes:
        out: An empty folder; what is in it when the stage ends becomes the artifact.
        preview: How many rows the user wants to look at, instead of having the stage run: a stage that trains says what
            it would train on, see `luthier.training.preview`. 0: it runs.
    """

    preview: int

    @property
    def out(self) -> Path:
        """An empty folder; what is in it when the stage ends becomes the artifact."""
        ...

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Report metrics of a step, such as the training loss."""
        ...

    def finished(self, path: Path) -> None:
        """Say that a file in `out` is finished: it is hashed now, while the stage may do something else."""
        ...
