"""The metrics of how answers look: ``regex``, ``json_valid``, ``json_schema``, ``length``, ``repetition``."""

from __future__ import annotations

import json
import re
from functools import cached_property
from typing import Any, ClassVar, TypeVar

from luthier.api import DataError, LuthierError, Sample
from luthier.artifacts.extras import needed
from luthier_plugins.metrics.answers import AnswerMetric
from luthier_plugins.metrics.config import (
    JsonSchemaConfig,
    JsonValidConfig,
    LengthConfig,
    RegexConfig,
    RepetitionConfig,
)

J = TypeVar("J", bound=JsonValidConfig)
FENCE = re.compile(r"\s*```\w*\s*\n(.*?)\n?```\s*", re.DOTALL)
RUN = 4
"""Words of a run."""


class Regex(AnswerMetric[RegexConfig]):
    """The share of answers that the pattern is found in, from 0 to 1."""

    def of(self, sample: Sample) -> float:
        if self.config.whole:
            return float(re.fullmatch(self.config.pattern, sample.answer.strip()) is not None)
        return float(re.search(self.config.pattern, sample.answer) is not None)


class _Json(AnswerMetric[J]):
    def parsed(self, text: str) -> Any:
        """What an answer holds.

        Raises:
            ValueError: it is no JSON.
        """
        fenced = FENCE.fullmatch(text) if self.config.fenced else None
        try:
            return json.loads(fenced[1] if fenced else text, parse_constant=_refuse)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


class JsonValid(_Json[JsonValidConfig]):
    """The share of answers that are JSON (RFC 8259), from 0 to 1."""

    def of(self, sample: Sample) -> float:
        try:
            self.parsed(sample.answer)
        except ValueError:
            return 0.0
        return 1.0


class JsonSchema(_Json[JsonSchemaConfig]):
    """The share of answers that are JSON and follow the schema, from 0 to 1."""

    @cached_property
    def _validator(self) -> Any:
        jsonschema = needed("jsonschema", "jsonschema", "evaluation")
        kind = jsonschema.validators.validator_for(self.config.json_schema)
        try:
            kind.check_schema(self.config.json_schema)
        except jsonschema.SchemaError as error:
            raise LuthierError(f"`json_schema` is no JSON schema: {error.message}") from error
        return kind(self.config.json_schema)

    def of(self, sample: Sample) -> float | None:
        validator = self._validator
        try:
            value = self.parsed(sample.answer)
        except ValueError:
            return None
        return float(validator.is_valid(value))


class Length(AnswerMetric[LengthConfig]):
    """The mean length of answers."""

    higher_is_better: ClassVar[bool] = False

    def of(self, sample: Sample) -> float:
        if self.config.of == "characters":
            return float(len(sample.answer))
        if self.config.of == "words":
            return float(len(sample.answer.split()))
        tokens = sample.answers[0].tokens
        if tokens is None:
            raise DataError("the program does not say how many tokens an answer has", hint="take `of: characters`")
        return float(tokens)


class Repetition(AnswerMetric[RepetitionConfig]):
    """The mean share of an answer's runs of four words that it has said before (Welleck et al., arXiv 1908.04319),
    from 0 to 1."""

    higher_is_better: ClassVar[bool] = False

    def of(self, sample: Sample) -> float:
        words = sample.answer.split()
        runs = [tuple(words[start : start + RUN]) for start in range(len(words) - RUN + 1)]
        return 1 - len(set(runs)) / len(runs) if runs else 0.0
