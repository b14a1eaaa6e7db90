"""The config of the stage ``evaluate``."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from luthier.api import DatasetInput, Field, Gate, MetricUse, ModelInput, NotIdentity, StageConfig
from luthier.api.artifact import ArtifactKind
from pydantic import field_validator

COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
REQUIREMENT = re.compile(r"\s*(>=|<=|>|<)\s*(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)\s*")


class EvaluateConfig(StageConfig):
    """Measures on the split `test`, which no training stage can reach."""

    kind_made: ClassVar[ArtifactKind] = "report"
    seeded: ClassVar[bool] = False

    model: ModelInput
    """The model or adapter to measure."""
    against: ModelInput | None = None
    """Another one to show beside it, such as the untuned base."""
    data: DatasetInput
    """Conversations with the split `test`; the last assistant turn is the reference."""
    metrics: list[MetricUse] = Field(default=["exact_match"], min_length=1)  # type: ignore[assignment]
    """What to measure."""
    by: str | None = None
    """A column of the data whose values are reported apart as well, such as the name of a slice."""
    max_new_tokens: int = Field(default=128, gt=0)
    """The most tokens of an answer."""
    require: Annotated[dict[str, str], NotIdentity()] = {}
    """Gates: a metric and what its value has to be, as ``exact_match: ">= 0.8"``."""

    @field_validator("require")
    @classmethod
    def _requirements_parse(cls, value: dict[str, str]) -> dict[str, str]:
        for metric, text in value.items():
            if REQUIREMENT.fullmatch(text) is None:
                raise ValueError(f"the requirement {text!r} on {metric} is not like '>= 0.8'")
        return value

    def problems(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        names = {use.name for use in self.metrics}
        found = [f"`require` names {name}, which is not among `metrics`" for name in self.require if name not in names]
        for facts in inputs.get("data", []):
            if not facts["rows"].get("test"):
                found.append("the data has no split 'test': give its stage `split: {test: 0.1}`")
        return found

    def gates(self, facts: Mapping[str, Any]) -> list[Gate]:
        scores: Mapping[str, float] = facts["scores"]
        return [_gate(metric, text, scores.get(metric)) for metric, text in self.require.items()]


def _gate(metric: str, text: str, value: float | None) -> Gate:
    match = REQUIREMENT.fullmatch(text)
    assert match is not None, "checked when the config was read"
    holds = value is not None and COMPARISONS[match[1]](value, float(match[2]))
    return Gate(metric, text.strip(), value, bool(holds))
