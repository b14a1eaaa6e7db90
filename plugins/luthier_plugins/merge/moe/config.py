"""The config of the stage ``moe``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from luthier.api import Config, Field, ModelInput, StageConfig, full_precision_problems
from luthier.api.artifact import ArtifactKind
from luthier.merging.config import ModelDtype
from luthier_plugins.merge.moe.families import FAMILIES
from pydantic import model_validator


class ExpertConfig(Config):
    """One expert."""

    model: ModelInput
    """The dense model whose feed-forward layers become the expert."""
    prompts: list[Annotated[str, Field(min_length=1)]] = []
    """Texts that this expert is for, for `router: prompts`."""


class MoeConfig(StageConfig):
    """A mixture whose experts are the feed-forward layers of dense models: a Mixtral of Llama and Mistral models, a
    Qwen 2 MoE of Qwen 2 models, a Qwen 3 MoE of Qwen 3 models.
    """

    kind_made: ClassVar[ArtifactKind] = "model"

    base: ModelInput
    """Where everything else comes from: embeddings, attention, norms, tokenizer."""
    experts: list[ExpertConfig] = Field(min_length=2)
    """The experts."""
    experts_per_token: int = Field(default=2, gt=0)
    """How many experts work on a token."""
    router: Literal["prompts", "random", "uniform"] = "prompts"
    """How routers begin: aligned with the experts' prompts, at random, or with no preference (of equals the first are
    chosen: train such routers)."""
    dtype: ModelDtype | None = None
    """What the weights are stored in; by default what the base is stored in."""
    shard_size: int = Field(default=5_000_000_000, gt=0)
    """The largest size of one weights file, in bytes."""

    @model_validator(mode="after")
    def _fits(self) -> MoeConfig:
        if self.experts_per_token > len(self.experts):
            raise ValueError(f"{self.experts_per_token} experts per token, but only {len(self.experts)} experts")
        if self.router == "prompts" and not all(expert.prompts for expert in self.experts):
            raise ValueError("`router: prompts` needs `prompts` for every expert")
        return self

    def early_problems(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        return full_precision_problems(inputs, list(inputs), "take the models before they were quantized")

    def input_problems(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        if quantized := self.early_problems(inputs):
            return quantized
        facts = [item for items in inputs.values() for item in items]
        found = list(dict.fromkeys(str(item["architecture"]) for item in facts))
        unknown = [name for name in found if name not in FAMILIES]
        if unknown:
            return [f"experts are made of {', '.join(FAMILIES)}, not of {name}" for name in unknown]
        kinds = {FAMILIES[name].architecture for name in found}
        return [f"one mixture cannot hold {' and '.join(found)}"] if len(kinds) > 1 else []
