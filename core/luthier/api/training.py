"""The config fields that every training stage has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from luthier.api.artifact import ArtifactKind
from luthier.api.config import (
    DatasetInput,
    Estimate,
    ModelInput,
    NotIdentity,
    RegularizerUse,
    StageConfig,
    other_formats,
)


class TrainingConfig(StageConfig):
    """How long, how fast and in which batches to train."""

    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training rows; 1 when neither this nor `steps` is given."""
    steps: int | None = Field(default=None, gt=0)
    """Optimizer steps; instead of `epochs`."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """The peak learning rate of AdamW."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after warm-up."""
    warmup: float = Field(default=0.0, ge=0, lt=1)
    """The share of steps over which the learning rate rises from 0."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay."""
    batch_size: int = Field(default=8, gt=0)
    """Rows in one forward pass."""
    accumulate: int = Field(default=1, gt=0)
    """Forward passes in one optimizer step."""
    max_length: int = Field(default=1024, gt=1)
    """The longest row in tokens; longer ones are handled as `on_long` says, never cut in silence."""
    gradient_checkpointing: bool = False
    """Trade time for memory."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """The precision of forward and backward passes; weights and optimizer stay in fp32."""
    regularizers: list[RegularizerUse] = []
    """Terms added to the loss."""
    save_every: Annotated[int, NotIdentity()] = Field(default=200, gt=0)
    """Steps between checkpoints, from which a killed stage resumes."""
    log_every: Annotated[int, NotIdentity()] = Field(default=10, gt=0)
    """Steps between logged metrics."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give `epochs` or `steps`, not both")
        return self

    def estimate(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Estimate:
        parameters = sum(facts.get("parameters", 0) for facts in inputs.get("model", []))
        rows = sum(facts["rows"].get("train", 0) for facts in inputs.get("data", []))
        # Weights, gradients and two moments in fp32, four bytes each.
        return Estimate(rows=rows or None, memory=16 * parameters or None, disk=14 * parameters or None)


class PreferenceTrainingConfig(TrainingConfig):
    """What every stage that trains on preference pairs has."""

    model: ModelInput
    """The model to train; an adapter is trained further, on its base."""
    data: DatasetInput
    """Preference pairs."""
    on_long: Literal["drop", "fail"] = "drop"
    """What to do with pairs longer than `max_length`: leave them out and say how many, or stop."""

    def produces(self, inputs: Mapping[str, Sequence[ArtifactKind]]) -> ArtifactKind:
        return "adapter" if "adapter" in inputs["model"] else "model"

    def problems(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        return other_formats("preference training", inputs, ("preference",))
