"""The config of the stage ``export``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from luthier.api import Estimate, ExporterUse, Field, ModelInput, StageConfig
from luthier.api.artifact import ArtifactKind
from luthier.api.estimates import comparing_memory


class ExportConfig(StageConfig):
    """Writes a model in the format of another program, which then has to load it and behave alike."""

    kind_made: ClassVar[ArtifactKind] = "export"
    seeded: ClassVar[bool] = False

    model: ModelInput
    """The model; an adapter is folded into its full-precision base first."""
    format: ExporterUse = Field(default="gguf")  # type: ignore[assignment]
    """The format and its settings."""

    def estimate(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Estimate:
        # Beside the model stands what was written, unless llama.cpp maps that.
        models = 1 if self.format.name == "gguf" else 2
        return Estimate(memory=next((comparing_memory(facts, models) for facts in inputs.get("model", [])), None))
