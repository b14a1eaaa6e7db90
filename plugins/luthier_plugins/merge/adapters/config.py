"""The configs of the stages ``merge_adapters`` and ``extract_lora``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from luthier.api import Field, Input, MergeMethodUse, ModelInput, StageConfig, full_precision_problems
from luthier.api.artifact import ArtifactKind
from luthier.merging.api import MergeMethodConfig
from luthier.merging.config import settings_problems
from pydantic import model_validator

AdapterInput = Annotated[str, Input(("adapter",))]


class RankConfig(StageConfig):
    """How many singular vectors an adapter keeps."""

    kind_made: ClassVar[ArtifactKind] = "adapter"

    r: int | None = Field(default=None, gt=0)
    """The rank of the new adapter, at most."""
    energy: float | None = Field(default=None, gt=0, le=1)
    """Keep, matrix by matrix, as many singular values as hold this share of the sum of their squares."""


class MergeAdaptersConfig(RankConfig):
    """Merges adapters that sit on the same model into one adapter."""

    models: list[AdapterInput] = Field(min_length=1)
    """The adapters."""
    weights: list[float] | None = None
    """One weight per adapter; 1 by default."""
    method: MergeMethodUse = Field(default="linear")  # type: ignore[assignment]
    """How the adapters' updates become one; task vectors are the updates themselves."""
    space: Literal["cat", "delta", "core"] = "cat"
    """Where they are merged. ``cat`` puts the factors side by side: exact, for `linear`. ``delta`` multiplies them
    out, merges, and takes the first singular vectors. ``core`` does the same in the small space that the factors span
    together, at a fraction of the cost."""

    @model_validator(mode="after")
    def _fits(self) -> MergeAdaptersConfig:
        method, name, count = self.method.config, self.method.name, len(self.models)
        if not isinstance(method, MergeMethodConfig):
            raise ValueError(f"the config of {name} is not a MergeMethodConfig")
        problems: list[str] = []
        if self.weights is not None and len(self.weights) != count:
            problems.append(f"{len(self.weights)} weights for {count} adapters")
        if self.space == "cat" and name != "linear":
            problems.append(f"`space: cat` is exact for linear only; use `core` or `delta` for {name}")
        if self.space == "cat" and (self.r is not None or self.energy is not None):
            problems.append("`space: cat` keeps everything: choose `core` or `delta` for a smaller rank")
        least, most = method.models
        if count < least or (most is not None and count > most):
            problems.append(f"{name} cannot merge {count} adapters")
        if method.prepares:
            problems.append(f"{name} measures what whole models do with data: use it in the stage `merge`")
        if not method.weighted and self.weights is not None:
            problems.append(f"{name} does not use weights: leave them out")
        problems += settings_problems(method, name, self.weights or [], [count])
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def input_problems(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        facts = inputs.get("models", [])
        other = [str(item["adapter"]) for item in facts if item["adapter"] != "lora"]
        found = [
            f"the update of a {name} adapter is not a low-rank matrix: merge it as a model, in the stage `merge`"
            for name in other
        ]
        if len({item["base"] for item in facts}) > 1:
            found.append("the adapters sit on different models")
        return list(dict.fromkeys(found))


class ExtractLoraConfig(RankConfig):
    """The difference between a tuned model and its ancestor as a LoRA adapter on the ancestor."""

    seeded: ClassVar[bool] = False

    model: ModelInput
    """The tuned model."""
    base: Annotated[str, Input(("model",))]
    """The model it was tuned from; the adapter will sit on it."""
    head: bool = False
    """Also the output head, where it is a separate layer; else what differs in it is left out with a warning."""

    def early_problems(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        return full_precision_problems(inputs, ("model", "base"), "take the models before they were quantized")

    @model_validator(mode="after")
    def _a_rank(self) -> ExtractLoraConfig:
        if self.r is None and self.energy is None:
            raise ValueError("say how much to keep: a rank `r`, a share of `energy`, or both")
        return self
