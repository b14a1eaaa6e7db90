"""The config of the stage ``evaluate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from luthier.api import (
    BadRows,
    Config,
    DatasetInput,
    Field,
    MetricConfig,
    MetricUse,
    NotIdentity,
    OneOrMany,
    Use,
    schema_problems,
)
from luthier.api.artifact import ArtifactKind
from luthier_plugins.evaluate.compared import PARTS, ComparedConfig, parsed
from pydantic import model_validator

KEEP = "keep."
"""What the names of metrics on general data begin with."""


class Marks(Config):
    """The marks around thinking."""

    opens: str = Field(min_length=1)
    """The mark before it, such as ``<think>``."""
    closes: str = Field(min_length=1)
    """The mark behind it, such as ``</think>``."""


class EvaluateConfig(ComparedConfig):
    """Measures on the split `test`, which no training stage can reach."""

    dated: ClassVar[bool] = True
    measures_on: ClassVar[tuple[str, ...]] = ("data", "keep")

    variant: str | None = None
    """Which file of an export, such as ``Q4_K_M``; by default its last."""
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

    @model_validator(mode="after")
    def _requirements_fit(self) -> EvaluateConfig:
        names = [*self.names, *(f"{KEEP}{name}" for name in self.kept_names)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two metrics are called '{twice[0]}': give one another `name`")
        for name in self.require:
            metric, part = self.required(name)
            if metric not in names:
                raise ValueError(f"`require` names {name}, which is not among `metrics` ({', '.join(names)})")
            if part == "change" and parsed(self.require[name])["stage"] is not None:
                raise ValueError(f"`require` compares {name}, a share, with another model's value: name a number")
        for metric, text in self.require.items():
            stage = parsed(text)["stage"]
            known = self.against or "against" in self.model_fields_set
            if stage is not None and known and stage not in self.against:
                raise ValueError(f"`require` compares {metric} with '{stage}', which is not among `against`")
        return self

    def kind_problems(self, inputs: Mapping[str, Sequence[ArtifactKind]]) -> list[str]:
        found: list[str] = []
        if self.variant is not None and "export" not in inputs["model"]:
            found.append("`variant` names a file of an export, but the model is not one: leave it out")
        changes = [name for name in self.require if self.required(name)[1] == "change"]
        if changes and not self.against:
            found.append(f"`require` names {changes[0]}, the change from another model: name that under `against`")
        if self.keep is not None and not self.against:
            found.append("`keep` shows what was forgotten since another model: name that under `against`")
        return found

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

    def required(self, name: str) -> tuple[str, str]:
        """The metric that a gate is on, and which part of it; empty: its value."""
        metric, _, part = name.rpartition(".")
        known = [*self.names, *(f"{KEEP}{name}" for name in self.kept_names)]
        return (metric, part) if part in PARTS and name not in known else (name, "")


def _names(uses: Sequence[Use]) -> list[str]:
    return [(use.config.name if isinstance(use.config, MetricConfig) else None) or use.name for use in uses]
