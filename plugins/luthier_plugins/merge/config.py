"""The config of the stage ``merge``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from luthier.api import Field, MergeUse, ModelInput, StageConfig
from luthier.api.artifact import ArtifactKind
from pydantic import model_validator

SAME = ("architecture", "tokenizer", "tensors")


class MergeConfig(StageConfig):
    """Merges models that share an architecture and a tokenizer."""

    kind_made: ClassVar[ArtifactKind] = "model"
    seeded: ClassVar[bool] = False

    models: list[ModelInput] = Field(min_length=2)
    """The models, the first of which gives config, tokenizer and chat template. An adapter is folded into
    its base first."""
    base: ModelInput | None = None
    """The common ancestor, for methods that merge task vectors."""
    weights: list[float] | None = None
    """One weight per model; equal weights by default."""
    method: MergeUse = Field(default="linear")  # type: ignore[assignment]
    """How tensors become one."""

    @model_validator(mode="after")
    def _weights_fit(self) -> MergeConfig:
        if self.weights is not None and len(self.weights) != len(self.models):
            raise ValueError(f"{len(self.weights)} weights for {len(self.models)} models")
        if self.weights is not None and sum(self.weights) == 0:
            raise ValueError("the weights sum to zero")
        return self

    def problems(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        models = [*inputs.get("models", []), *inputs.get("base", [])]
        found: list[str] = []
        for name in SAME:
            values = list(dict.fromkeys(str(facts.get(name)) for facts in models))
            if len(values) > 1:
                short = " and ".join(value[:24] for value in values)
                found.append(f"the models cannot be merged, their {name} differs: {short}")
        return found
