"""The configs of the metrics."""

from __future__ import annotations

from typing import Any, Literal

from luthier.api import Asks, Field, JudgeConfig, MetricConfig, MetricUse, Pattern
from pydantic import model_validator


class AnswerMetricConfig(MetricConfig):
    """Base of the metrics that look at answers."""

    max_new_tokens: int | None = Field(default=None, gt=0)
    """The maximum number of tokens in an answer; by default what the stage says."""


class ExactMatchConfig(AnswerMetricConfig):
    """What counts as equal."""

    strip: bool = True
    """Ignore white space at both ends."""
    ignore_case: bool = False
    """Ignore upper and lower case."""
    ignore_punctuation: bool = False
    """Ignore punctuation marks, and take any white space for one space."""


class NumericConfig(AnswerMetricConfig):
    """Which number of a text counts: the last one, or the first one behind a mark that the text has."""

    mark: str | None = "####"
    """What stands before the number where a text has it, as in GSM8K."""
    tolerance: float = Field(default=1e-6, ge=0)
    """By how much numbers may differ, as a share of the reference."""


class F1Config(AnswerMetricConfig):
    """Nothing to choose: case, punctuation and English articles do not count."""


class BleuConfig(AnswerMetricConfig):
    """How sacrebleu counts."""

    tokenize: Literal["13a", "char", "intl", "none", "zh"] = "13a"
    """How texts become words; ``zh`` for Chinese, ``char`` for other languages without spaces."""
    lowercase: bool = False
    """Ignore upper and lower case."""


class ChrfConfig(AnswerMetricConfig):
    """How sacrebleu counts."""

    word_order: int = Field(default=0, ge=0, le=4)
    """Also count runs of so many words; 2 is chrF++."""


class RougeConfig(AnswerMetricConfig):
    """How rouge-score counts."""

    type: Literal["rouge1", "rouge2", "rougeL", "rougeLsum"] = "rougeL"
    """Single words, pairs of words, the longest common subsequence, or that of each line."""
    stemmer: bool = False
    """Take English words with the same stem for the same."""


class RegexConfig(AnswerMetricConfig):
    """A pattern that good answers have."""

    pattern: Pattern
    """The regular expression."""
    whole: bool = False
    """Whether the whole answer, without white space at its ends, has to match."""


class JsonValidConfig(AnswerMetricConfig):
    """What counts as JSON."""

    fenced: bool = False
    """Whether it may stand in a Markdown fence."""


class JsonSchemaConfig(JsonValidConfig):
    """The schema that answers follow."""

    json_schema: dict[str, Any]
    """The JSON schema."""


class LengthConfig(AnswerMetricConfig):
    """What is counted."""

    of: Literal["characters", "words", "tokens"] = "characters"
    """Characters, words, or tokens as the program counts them."""


class RepetitionConfig(AnswerMetricConfig):
    """Nothing to choose."""


class PerplexityConfig(MetricConfig):
    """What a loss is divided by."""

    per: Literal["token", "byte"] = "token"
    """Tokens, or the UTF-8 bytes of what the assistant says: then models with unlike tokenizers can be compared."""


class MultipleChoiceConfig(MetricConfig):
    """Among which answers the model chooses, and how long ones are compared with short ones."""

    choices: list[str] = []
    """The answers, the same for each row; by default each row lists its own."""
    column: str = "choices"
    """The column of the data that lists a row's answers."""
    normalize: Literal["none", "token", "byte"] = "none"
    """What the log-probability of an answer is divided by: nothing, its tokens, or its UTF-8 bytes."""

    @model_validator(mode="after")
    def _can_choose(self) -> MultipleChoiceConfig:
        if self.choices and (len(self.choices) < 2 or len(set(self.choices)) < len(self.choices)):
            raise ValueError("`choices` has to list two answers at least, each once")
        return self


class TokenAccuracyConfig(MetricConfig):
    """Nothing to choose."""


class AgreementConfig(MetricConfig):
    """Nothing to choose: the other model is the first of `against`."""


class KlConfig(MetricConfig):
    """Nothing to choose: the other model is the first of `against`."""


class PassAtKConfig(AnswerMetricConfig):
    """How many answers are drawn, and what is right."""

    k: int = Field(default=1, gt=0)
    """Of how many answers one has to be right."""
    n: int = Field(default=5, gt=0)
    """How many are drawn to tell: the more, the less it is left to chance."""
    temperature: float = Field(default=0.8, gt=0)
    """How freely they are drawn."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Draw among the likeliest tokens that have this probability together."""
    of: MetricUse = "exact_match"  # type: ignore[assignment]
    """What says whether an answer is right: a metric that gives 1 to right ones, such as `numeric` or `code_runs`."""

    @model_validator(mode="after")
    def _enough(self) -> PassAtKConfig:
        if self.n < self.k:
            raise ValueError(f"of {self.n} answers no {self.k} can be taken: raise `n`")
        return self


class MathConfig(AnswerMetricConfig):
    """How long an answer may take to compare."""

    seconds: float = Field(default=5.0, gt=0)
    """After how many seconds the comparison of an answer is given up, which counts as wrong."""


class CodeRunsConfig(AnswerMetricConfig):
    """What is run, and its limits. A process of its own, without the environment's variables, in an empty folder, with
    limits of time and memory, is not a prison: run models that you do not trust in a container."""

    allow: bool
    """Whether code that a model wrote may be run on this machine: without `true` it is not measured."""
    tests: str | None = "tests"
    """The column of the data with Python code that follows the answer's and fails where it is wrong; null: it is enough
    that the answer's code runs."""
    with_prompt: bool = False
    """Whether answers go on with the code of the prompt, as in HumanEval."""
    seconds: float = Field(default=5.0, gt=0)
    """After how many seconds a program is stopped, which counts as wrong. On a slow machine it gets more."""
    memory: int = Field(default=1024, ge=64)
    """The most memory that a program may take, in MiB."""

    @model_validator(mode="after")
    def _allowed(self) -> CodeRunsConfig:
        if not self.allow:
            raise ValueError("this runs code that a model wrote on this machine: if you want that, say `allow: true`")
        return self


class JudgeMarkConfig(JudgeConfig, MetricConfig):
    """Who judges, and by what."""

    answer_tokens: int | None = Field(default=None, gt=0)
    """The maximum number of tokens in a judged answer; by default what the stage says."""


class WinRateConfig(Asks, MetricConfig):
    """Who judges, and by what. Both models' answers are shown in both orders; an answer wins that is preferred in
    both."""

    rubric: str = "It is correct, does what was asked for, and says nothing beside it."
    """What a good answer is."""
    max_new_tokens: int = Field(default=16, gt=0)
    """The maximum number of tokens in a verdict."""
    answer_tokens: int | None = Field(default=None, gt=0)
    """The maximum number of tokens in a judged answer; by default what the stage says."""
