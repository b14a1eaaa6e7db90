"""The config of the stage ``sft``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from luthier.api import AdapterUse, DatasetInputs, ModelInput, TrainingConfig
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

    def problems(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        formats = [facts["format"] for facts in inputs.get("data", [])]
        found = [f"sft trains on messages, not on {name}" for name in formats if name != "messages"]
        if self.adapter is not None and any("base" in facts for facts in inputs.get("model", [])):
            found.append("the model is an adapter already: leave `adapter` out to train it further")
        return found
