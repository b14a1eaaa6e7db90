"""The config of the stage ``lm_eval``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from luthier.api import Field, FileSource, OneOrMany
from luthier.api.artifact import ArtifactKind
from luthier_plugins.evaluate.compared import ComparedConfig


class HarnessConfig(ComparedConfig):
    """Tasks of lm-evaluation-harness, as its own command runs them. Metrics are called ``task/metric``, also in
    `require`."""

    tasks: Annotated[list[str], Field(min_length=1), OneOrMany()]
    """The tasks; one name, or a list."""
    include: FileSource | None = None
    """A folder with task files of yours. They are part of the key; what they name elsewhere is not."""
    few_shot: int | None = Field(default=None, ge=0)
    """How many examples stand before a question; by default what the task says."""
    limit: int | None = Field(default=None, gt=0)
    """The first so many questions of each task; by default all."""
    chat: bool = False
    """Whether questions are put into the model's chat template."""
    batch_size: int = Field(default=8, gt=0)
    """Requests in one batch."""
    allow_code: bool = False
    """Whether tasks may run code that the model wrote on this machine."""

    def kind_problems(self, inputs: Mapping[str, Sequence[ArtifactKind]]) -> list[str]:
        exports = [field for field in ("model", "against") if "export" in inputs[field]]
        return [
            f"`{field}` is an export, which gives no probabilities: name the model it was made from"
            for field in exports
        ]
