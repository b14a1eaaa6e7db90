"""The config of the stage ``sft``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from luthier.api import AdapterUse, DatasetInputs, ModelInput, TrainingConfig, other_formats
from luthier.api.artifact import ArtifactKind


class SftConfig(TrainingConfig):
    """Trains the assistant's turns of conversations, stop token included."""

    model: ModelInput
    """The model to tune; an adapter is trained further, on its base."""
    data: DatasetInputs
    """Conversations: one dataset, or several that are trained on together."""
    adapter: AdapterUse | None = None
    """Train an adapter instead of all weights."""
    on_long: Literal["drop", "fail"] = "drop"
    """What to do with rows longer than `max_length`: leave them out and say how many, or stop."""

    def produces(self, inputs: Mapping[str, Sequence[ArtifactKind]]) -> ArtifactKind:
        return "adapter" if self.adapter is not None or "adapter" in inputs["model"] else "model"

    def kind_problems(self, inputs: Mapping[str, Sequence[ArtifactKind]]) -> list[str]:
        if self.adapter is not None and "adapter" in inputs["model"]:
            return ["the model is an adapter already: leave `adapter` out to train it further"]
        return []

    def problems(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        return other_formats("sft", inputs, ("messages",))
