"""The config of the stage ``evaluate``."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from luthier.api import (
    BadRows,
    Config,
    DatasetInput,
    Field,
    Gate,
    Input,
    MetricConfig,
    MetricUse,
    NotIdentity,
    OneOrMany,
    StageConfig,
    Use,
    schema_problems,
)
from luthier.api.artifact import ArtifactKind
from luthier.api.config import references
from pydantic import field_validator, model_validator

COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
ROUNDING = 1e-9
"""0.9 - 0.3 is a little more than 0.6 in floating point; a gate does not fall for that."""
NUMBER = r"\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
REQUIREMENT = re.compile(
    rf"\s*(?P<than>>=|<=|>|<)\s*(?:(?P<number>-?{NUMBER})|(?P<stage>[A-Za-z][\w-]*?)(?:\s*(?P<by>[-+]\s*{NUMBER}))?)\s*"
)
KEEP = "keep."
"""What the names of metrics on general data begin with."""
PARTS = ("lower", "upper", "change")
"""What gates may be on beside a metric's value."""
Measured = Annotated[str, Input(("model", "adapter", "export"))]


class Marks(Config):
    """The marks around thinking."""

    opens: str = Field(min_length=1)
    """The mark before it, such as ``<think>``."""
    closes: str = Field(min_length=1)
    """The mark behind it, such as ``</think>``."""


class EvaluateConfig(StageConfig):
    """Measures on the split `test`, which no training stage can reach."""

    kind_made: ClassVar[ArtifactKind] = "report"
    dated: ClassVar[bool] = True
    measures_on: ClassVar[tuple[str, ...]] = ("data", "keep")

    model: Measured
    """The model or adapter to measure; or an export, asked in the program it is made for."""
    variant: str | None = None
    """Which file of an export, such as ``Q4_K_M``; by default its last."""
    against: Annotated[list[Measured], OneOrMany()] = []
    """Others to compare it with; one name, or a list. By default the model that it was tuned from, as far as the recipe
    says; `[]` for none."""
    data: DatasetInput
    """Conversations with the split `test`; the last assistant turn is the reference."""
    metrics: Annotated[list[MetricUse], OneOrMany()] = Field(default=["exact_match"], min_length=1)  # type: ignore[assignment]
    """What to measure; one metric, or a list. One metric may appear twice, with other settings and a `name`."""
    keep: DatasetInput | None = None
    """General data with the split `test`, on which the model is to stay as good as the first of `against`: what it
    forgot shows there, as ``keep.perplexity`` and so on."""
    keep_metrics: Annotated[list[MetricUse], OneOrMany()] = Field(
        default=["perplexity", "agreement"],
        min_length=1,  # type: ignore[assignment]
    )
    """What to measure on `keep`."""
    bad_rows: BadRows = BadRows()
    """Rows that a model's chat template refuses, or that are longer than its context: no model is asked them."""
    allow_leakage: Annotated[str | None, Field(min_length=1), NotIdentity()] = None
    """Why the model may have been trained on rows that it is tested on; by default it is not tested then."""
    clusters: str | None = None
    """A column of the data whose values say which rows belong together, such as several questions about one text: they
    are not independent, and intervals that take them for it are too narrow."""
    by: str | None = None
    """A column of the data whose values are reported apart as well, such as the name of a slice."""
    thinking: Literal["auto", "keep"] | Marks = "auto"
    """Where thinking ends and the answer begins, which metrics compare: where the model's chat template has it, or
    ``</think>`` (``auto``); nowhere (``keep``); or at marks that you name."""
    max_new_tokens: int = Field(default=128, gt=0)
    """The maximum number of tokens in an answer."""
    require: Annotated[dict[str, str], NotIdentity()] = {}
    """Gates: a metric and what its value has to be, as ``exact_match: ">= 0.8"``, or relative to one of
    `against`, as ``exact_match: ">= merged - 0.05"``. ``exact_match.lower`` and ``.upper`` are the ends of its
    interval, ``perplexity.change`` is by which share it differs from that of the first of `against`."""

    @property
    def leakage_allowed(self) -> str | None:
        return self.allow_leakage

    @property
    def names(self) -> list[str]:
        """What reports and gates call the metrics."""
        return _names(self.metrics)

    @property
    def kept_names(self) -> list[str]:
        """The same of those on `keep`, without what their names begin with."""
        return _names(self.keep_metrics) if self.keep is not None else []

    def completed(self, stages: Mapping[str, StageConfig]) -> EvaluateConfig:
        if "against" in self.model_fields_set:
            return self
        base = first_model(self.model, stages)
        bounds = [_parsed(text)["stage"] for text in self.require.values()]
        others = dict.fromkeys(name for name in (base, *bounds) if name is not None and name != self.model)
        return self.model_copy(update={"against": list(others)}) if others else self

    @field_validator("require")
    @classmethod
    def _requirements_parse(cls, value: dict[str, str]) -> dict[str, str]:
        for metric, text in value.items():
            if REQUIREMENT.fullmatch(text) is None:
                raise ValueError(f"the requirement {text!r} on {metric} is not like '>= 0.8' or '>= base + 0.1'")
        return value

    @model_validator(mode="after")
    def _requirements_fit(self) -> EvaluateConfig:
        names = [*self.names, *(f"{KEEP}{name}" for name in self.kept_names)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two metrics are called '{twice[0]}': give one another `name`")
        for name in self.require:
            metric, part = self._required(name)
            if metric not in names:
                raise ValueError(f"`require` names {name}, which is not among `metrics` ({', '.join(names)})")
            if part == "change" and _parsed(self.require[name])["stage"] is not None:
                raise ValueError(f"`require` compares {name}, a share, with another model's value: name a number")
            if part == "change" and not self.against and "against" in self.model_fields_set:
                raise ValueError(f"`require` names {name}, the change from another model: name that under `against`")
        for metric, text in self.require.items():
            stage = _parsed(text)["stage"]
            known = self.against or "against" in self.model_fields_set
            if stage is not None and known and stage not in self.against:
                raise ValueError(f"`require` compares {metric} with '{stage}', which is not among `against`")
        return self

    def kind_problems(self, inputs: Mapping[str, Sequence[ArtifactKind]]) -> list[str]:
        if self.variant is not None and "export" not in inputs["model"]:
            return ["`variant` names a file of an export, but the model is not one: leave it out"]
        return []

    def early_problems(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        found: list[str] = []
        for field in self.measures_on:
            found += schema_problems("evaluate", inputs, ("messages", "preference"), field)
            found += [
                f"the {'data' if field == 'data' else 'general data'} has no split 'test': give its stage "
                "`split: {test: 0.1}`"
                for facts in inputs.get(field, [])
                if "rows" in facts and not facts["rows"].get("test")
            ]
        for facts in inputs.get("data", []):
            columns: Sequence[str] = facts.get("columns", ())
            for key, column in (("by", self.by), ("clusters", self.clusters)):
                if column is not None and columns and column not in columns:
                    found.append(f"the data has no column '{column}', which `{key}` names: its stage has to `keep` it")
        for facts in inputs.get("model", []):
            if self.variant is not None and self.variant not in facts.get("files", [self.variant]):
                found.append(f"the export has no file '{self.variant}'; it has: {', '.join(facts['files'])}")
        return found

    def gates(self, facts: Mapping[str, Any]) -> list[Gate]:
        others = {name: found["scores"] for name, found in zip(self.against, facts["against"], strict=True)}
        return [self._gate(name, text, facts, others) for name, text in self.require.items()]

    def _required(self, name: str) -> tuple[str, str]:
        """The metric that a gate is on, and which part of it; empty: its value."""
        metric, _, part = name.rpartition(".")
        known = [*self.names, *(f"{KEEP}{name}" for name in self.kept_names)]
        return (metric, part) if part in PARTS and name not in known else (name, "")

    def _gate(self, name: str, text: str, facts: Mapping[str, Any], others: Mapping[str, Mapping[str, float]]) -> Gate:
        metric, part = self._required(name)
        value: float | None = facts["scores"][metric]
        if part == "change":
            base = others[self.against[0]][metric] if self.against else 0.0
            value = (facts["scores"][metric] - base) / abs(base) if base else None
        elif part:
            ends: Sequence[float] | None = facts["intervals"].get(metric)
            value = None if ends is None else ends[part == "upper"]
        return Gate(name, text.strip(), None, False) if value is None else _gate(name, metric, text, value, others)


def _names(uses: Sequence[Use]) -> list[str]:
    return [(use.config.name if isinstance(use.config, MetricConfig) else None) or use.name for use in uses]


def first_model(name: str, stages: Mapping[str, StageConfig]) -> str:
    """The model that others were made of until a stage made this one, as far as a recipe says.

    Args:
        name: The stage that made the model, or an artifact from outside.
        stages: The recipe's.
    """
    seen: set[str] = set()
    while name in stages and name not in seen:
        seen.add(name)
        # Of a merge, what it starts from; of several equal ones, the first.
        inputs = {field: values for field, _, values in references(stages[name], Input)}
        earlier = [values[0] for field in ("base", "model", "models") if (values := inputs.get(field))]
        # What another recipe made, or a folder, stands for itself; a name that nothing has is somebody else's error.
        if not earlier or (earlier[0] not in stages and "/" not in earlier[0]):
            break
        name = earlier[0]
    return name


def _parsed(text: str) -> re.Match[str]:
    match = REQUIREMENT.fullmatch(text)
    assert match is not None, "checked when the config was read"
    return match


def _gate(name: str, metric: str, text: str, value: float, others: Mapping[str, Mapping[str, float]]) -> Gate:
    match = _parsed(text)
    if match["stage"] is None:
        bound = float(match["number"])
    else:
        bound = others[match["stage"]][metric] + float((match["by"] or "0").replace(" ", ""))
    if "=" in match["than"] and abs(value - bound) <= ROUNDING:
        bound = value
    return Gate(name, text.strip(), value, bool(COMPARISONS[match["than"]](value, bound)))
