"""The protocol of metrics, and what they see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

from luthier.api.component import C, Implementation
from luthier.api.config import Config, Field
from luthier.api.data import Row
from luthier.api.errors import DataError
from luthier.api.serving import Completion, Sampling

if TYPE_CHECKING:
    import numpy as np


class MetricConfig(Config):
    """Base of a metric's config."""

    name: str | None = Field(default=None, pattern=r"[A-Za-z][\w.-]*")
    """What reports and gates call it; by default the metric's own name. It lets one metric appear twice, with other
    settings."""


@dataclass(frozen=True, slots=True)
class Answers:
    """How a metric has a model asked.

    Attributes:
        n: Answers to each row; several of them need a temperature.
        temperature: 0 takes the likeliest token each time.
        top_p: Draw among the likeliest tokens that have this probability together.
        max_new_tokens: The maximum number of tokens in an answer; None: what the stage says.
    """

    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int | None = None

    def sampling(self, max_new_tokens: int, seed: int) -> Sampling:
        """The generator's instructions.

        Args:
            max_new_tokens: What the stage says.
            seed: The stage's seed.
        """
        return Sampling(self.max_new_tokens or max_new_tokens, self.temperature, self.top_p, self.n, seed)


@dataclass(frozen=True, slots=True)
class Choices:
    """The answers among which a model is to choose.

    Attributes:
        column: The row's column that lists them; only where `fixed` is empty.
        fixed: The same ones for every row.
    """

    column: str = "choices"
    fixed: tuple[str, ...] = ()

    def of(self, row: Row) -> tuple[str, ...]:
        """Those of a row.

        Raises:
            DataError: it lists none.
        """
        if self.fixed:
            return self.fixed
        found: Any = row.get(self.column)
        listed: list[Any] = cast("list[Any]", found) if isinstance(found, list) else []
        if len(listed) < 2 or not all(isinstance(item, str) and item.strip() for item in listed):
            raise DataError(
                f"a row has no list of two texts or more in the column '{self.column}' to choose among",
                hint=f"have the data stage keep it: `keep: [{self.column}]`",
            )
        return tuple(dict.fromkeys(cast("list[str]", listed)))


@dataclass(frozen=True, slots=True)
class Needs:
    """What a metric wants of a model, row by row.

    Attributes:
        answers: How it is asked; None: not at all.
        token_logps: Whether the log-probabilities of the reference's tokens are wanted.
        distributions: Whether the log-probabilities of the whole vocabulary at these tokens are wanted.
        choices: Among which answers the model is to choose, whose log-probabilities are wanted; None: none.
        baseline: Whether the same is wanted of the model that the stage compares with.
    """

    answers: Answers | None = None
    token_logps: bool = False
    distributions: bool = False
    choices: Choices | None = None
    baseline: bool = False

    @property
    def probabilities(self) -> bool:
        """Whether it wants any of the model's probabilities, which exports do not give."""
        return self.token_logps or self.distributions or self.choices is not None


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the answers among which a model is to choose.

    Attributes:
        text: The answer.
        logps: log p of each of its tokens behind the row's prompt, stop token included, in nats.
    """

    text: str
    logps: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One row, and what a model made of it.

    Attributes:
        row: The row, all columns included.
        prompt: The text of the last message before the reference.
        reference: The text of the row's own last answer.
        answers: What the model answered, as often as the metric asked.
        logps: log p of each token that training on the row would train (the assistant's turns, stop tokens included),
            in nats.
        targets: The ids of these tokens.
        likeliest: The ids of the tokens that the model takes for the likeliest in their places.
        choices: The answers among which it is to choose, in the row's order.
        distribution: Reads log p of the whole vocabulary at each of these tokens: float32, shape (tokens, vocabulary).
    """

    row: Row
    prompt: str
    reference: str
    answers: tuple[Completion, ...] = ()
    logps: tuple[float, ...] = ()
    targets: tuple[int, ...] = ()
    likeliest: tuple[int, ...] = ()
    choices: tuple[Choice, ...] = ()
    distribution: Callable[[], np.ndarray[Any, Any]] | None = field(default=None, repr=False)

    @property
    def answer(self) -> str:
        """The text of the first answer."""
        return self.answers[0].text


@dataclass(frozen=True, slots=True)
class Score:
    """A metric over all rows.

    Attributes:
        value: The number.
        by_row: What each row contributed, in their order, on a scale on which means make sense and that has the
            metric's direction: of a perplexity, the row's nats per token. None where it says nothing of a row.
        weights: What each row counts in the mean, such as its tokens; None: all the same.
        of_mean: What makes the value of the mean of rows, where it is not the mean itself: of a perplexity, exp.
        is_mean: Whether the value is made of the mean of rows at all: BLEU is not.
        resampled: What makes the value of some of the rows, by their places (any of them several times), where it is
            not made of a mean: then it has an interval, by bootstrap.
        neutral: Of a metric that compares with another model, what a row has where both are alike: then it is told
            whether the rows are above it. The other model has no score of its own to be compared with.
        unread: Answers of which the metric could make nothing: no number, no JSON. They count as wrong.
        counts: What else is to be told of how it came about, by words, such as how many programs were stopped.
    """

    value: float
    by_row: Sequence[float | None]
    weights: Sequence[float] | None = None
    of_mean: Callable[[float], float] | None = None
    is_mean: bool = True
    resampled: Callable[[np.ndarray[Any, Any]], float] | None = field(default=None, repr=False)
    neutral: float | None = None
    unread: int = 0
    counts: Mapping[str, int] = field(default_factory=dict[str, int])


class Metric(Implementation[C]):
    """Kind ``metric``: a number for a model's quality."""

    higher_is_better: ClassVar[bool]
    """Which way is better: what searches and comparisons go by."""

    @property
    def needs(self) -> Needs:
        """What it wants of a model; may depend on its config."""
        raise NotImplementedError

    def score(self, samples: Sequence[Sample], baseline: Sequence[Sample] | None) -> Score:
        """The metric over all samples, or over those of a slice.

        Args:
            samples: The model's, at least one.
            baseline: The same rows with what the model made of them that the stage compares with; None where the metric
                does not need one.
        """
        raise NotImplementedError
