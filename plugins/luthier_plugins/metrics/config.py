"""The configs of the metrics."""

from __future__ import annotations

from typing import Any, Literal

from luthier.api import Field, MetricConfig, Pattern


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
