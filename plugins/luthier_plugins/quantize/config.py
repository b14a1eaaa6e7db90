"""The config of the stage ``quantize``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from luthier.api import (
    DatasetInput,
    Estimate,
    Field,
    ModelInput,
    QuantizerUse,
    StageConfig,
    full_precision_problems,
)
from luthier.api.artifact import ArtifactKind
from luthier.api.estimates import comparing_memory


class QuantizeConfig(StageConfig):
    """Makes a model with fewer bits per weight, which is measured, chatted with, served and exported like any other."""

    kind_made: ClassVar[ArtifactKind] = "model"
    seeded: ClassVar[bool] = False

    model: ModelInput
    """The model; an adapter is folded into its full-precision base first."""
    method: QuantizerUse
    """How the weights are stored, such as ``awq``."""
    calibration: DatasetInput | None = None
    """What the quantizer calibrates on; by default the data that the model was tuned on."""
    max_kl: float | None = Field(default=None, gt=0)
    """The largest mean KL divergence to the model it came from, in nats per token; by default what the method says."""

    def expected_facts(
        self, inputs: Mapping[str, Sequence[Mapping[str, Any]]], sources: Mapping[str, Sequence[str]]
    ) -> Mapping[str, Any]:
        return {**super().expected_facts(inputs, sources), "quantization": {"method": self.method.name}}

    def early_problems(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        return full_precision_problems(inputs, ("model",), "take the model that it was made from")

    def estimate(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Estimate:
        # Beside the model stands what was written.
        return Estimate(memory=next((comparing_memory(facts, 2) for facts in inputs.get("model", [])), None))
