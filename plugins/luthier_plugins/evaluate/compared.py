"""What the configs of stages share that measure models beside each other: with what, and gates."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from luthier.api import Gate, Input, NotIdentity, OneOrMany, StageConfig
from luthier.api.artifact import ArtifactKind
from luthier.api.config import references
from pydantic import field_validator

COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
ROUNDING = 1e-9
"""0.9 - 0.3 is a little more than 0.6 in floating point; a gate does not fall for that."""
NUMBER = r"\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
REQUIREMENT = re.compile(
    rf"\s*(?P<than>>=|<=|>|<)\s*(?:(?P<number>-?{NUMBER})|(?P<stage>[A-Za-z][\w-]*?)(?:\s*(?P<by>[-+]\s*{NUMBER}))?)\s*"
)
PARTS = ("lower", "upper", "change")
"""What gates may be on beside a metric's value."""
Measured = Annotated[str, Input(("model", "adapter", "export"))]


class ComparedConfig(StageConfig):
    """Base of the configs of stages that measure."""

    kind_made: ClassVar[ArtifactKind] = "report"

    model: Measured
    """The model or adapter to measure; or an export, asked in the program it is made for."""
    against: Annotated[list[Measured], OneOrMany()] = []
    """Others to compare it with; one name, or a list. By default the model that it was tuned from, as far as the recipe
    says; `[]` for none."""
    require: Annotated[dict[str, str], NotIdentity()] = {}
    """Gates: a metric and what its value has to be, as ``exact_match: ">= 0.8"``, or relative to one of
    `against`, as ``exact_match: ">= merged - 0.05"``. ``exact_match.lower`` and ``.upper`` are the ends of its
    interval, ``perplexity.change`` is by which share it differs from that of the first of `against`."""

    def completed(self, stages: Mapping[str, StageConfig]) -> ComparedConfig:
        if "against" in self.model_fields_set:
            return self
        base = first_model(self.model, stages)
        bounds = [parsed(text)["stage"] for text in self.require.values()]
        others = dict.fromkeys(name for name in (base, *bounds) if name is not None and name != self.model)
        return self.model_copy(update={"against": list(others)}) if others else self

    @field_validator("require")
    @classmethod
    def _requirements_parse(cls, value: dict[str, str]) -> dict[str, str]:
        for metric, text in value.items():
            if REQUIREMENT.fullmatch(text) is None:
                raise ValueError(f"the requirement {text!r} on {metric} is not like '>= 0.8' or '>= base + 0.1'")
        return value

    def gates(self, facts: Mapping[str, Any]) -> list[Gate]:
        others = {name: found["scores"] for name, found in zip(self.against, facts["against"], strict=True)}
        return [self._gate(name, text, facts, others) for name, text in self.require.items()]

    def required(self, name: str) -> tuple[str, str]:
        """The metric that a gate is on, and which part of it; empty: its value."""
        metric, _, part = name.rpartition(".")
        return (metric, part) if part in PARTS else (name, "")

    def _gate(self, name: str, text: str, facts: Mapping[str, Any], others: Mapping[str, Mapping[str, float]]) -> Gate:
        metric, part = self.required(name)
        value: float | None = facts["scores"].get(metric)
        if part == "change":
            base = others[self.against[0]].get(metric) if self.against else None
            value = (value - base) / abs(base) if value is not None and base else None
        elif part:
            ends: Sequence[float] | None = facts["intervals"].get(metric)
            value = None if ends is None else ends[part == "upper"]
        return Gate(name, text.strip(), None, False) if value is None else _gate(name, metric, text, value, others)


def first_model(name: str, stages: Mapping[str, StageConfig]) -> str:
    """The model that others were made of until a stage made this one, as far as a recipe says.

    Args:
        name: The stage that made the model, or an artifact from outside.
        stages: The recipe's.
    """
    seen: set[str] = set()
    while name in stages and name not in seen:
        seen.add(name)
        # A model that is given a chat template here could not be asked before.
        if getattr(stages[name], "chat_template", None) is not None:
            break
        # Of a merge, what it starts from; of several equal ones, the first.
        inputs = {field: values for field, _, values in references(stages[name], Input)}
        earlier = [values[0] for field in ("base", "model", "models") if (values := inputs.get(field))]
        # What another recipe made, or a folder, stands for itself; a name that nothing has is somebody else's error.
        if not earlier or (earlier[0] not in stages and "/" not in earlier[0]):
            break
        name = earlier[0]
    return name


def parsed(text: str) -> re.Match[str]:
    match = REQUIREMENT.fullmatch(text)
    assert match is not None, "checked when the config was read"
    return match


def _gate(name: str, metric: str, text: str, value: float, others: Mapping[str, Mapping[str, float]]) -> Gate:
    match = parsed(text)
    if match["stage"] is None:
        bound = float(match["number"])
    else:
        bound = others[match["stage"]][metric] + float((match["by"] or "0").replace(" ", ""))
    if "=" in match["than"] and abs(value - bound) <= ROUNDING:
        bound = value
    return Gate(name, text.strip(), value, bool(COMPARISONS[match["than"]](value, bound)))
