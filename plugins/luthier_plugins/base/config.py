"""The config of the stage ``base``."""

from __future__ import annotations

from typing import ClassVar

from luthier.api import ModelSource, StageConfig
from luthier.api.artifact import ArtifactKind


class BaseConfig(StageConfig):
    """A model folder, or a hub model pinned to a commit."""

    kind_made: ClassVar[ArtifactKind] = "model"
    seeded: ClassVar[bool] = False

    source: ModelSource = "embedded:nano-base"
    """A folder with safetensors, config and tokenizer; or ``hf:org/name``, ``hf:org/name@revision``; or the
    small model that comes with Luthier, for trying things out on a CPU."""
