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

CHARACTERS_PER_TOKEN = 4


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
        data = inputs.get("data", [])
        rows = sum(facts.get("rows", {}).get("train", 0) for facts in data)
        if self.steps is not None and rows:
            rows = self.steps * self.batch_size * self.accumulate
        elif self.epochs is not None:
            rows = round(rows * self.epochs)
        # Weights, gradients and two moments in fp32, four bytes each.
        return Estimate(
            rows=rows or None,
            tokens=_tokens(data, rows) or None,
            memory=16 * parameters or None,
            disk=14 * parameters or None,
        )


def _tokens(data: Sequence[Mapping[str, Any]], rows: int) -> int:
    """About how many tokens so many rows have: a token is some four characters of text."""
    characters = sum(facts.get("characters", 0) for facts in data)
    known = sum(sum(facts.get("rows", {}).values()) for facts in data if "characters" in facts)
    return round(characters / CHARACTERS_PER_TOKEN * rows / known) if known else 0


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
