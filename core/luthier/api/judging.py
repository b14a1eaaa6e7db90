"""The configs of what asks a generator, and of a judge."""

from __future__ import annotations

from typing import Any

from luthier.api.config import Config, Field, GeneratorUse
from luthier.api.serving import Sampling


class Asks(Config):
    """Base of what asks a generator."""

    generator: GeneratorUse
    """Who answers, such as `{uses: openai, url: ..., model: ...}` or `{uses: model, model: STAGE}`."""
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the likeliest token each time."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw among the likeliest tokens that have this probability together."""
    max_new_tokens: int = Field(default=512, gt=0)
    """The maximum number of tokens in an answer; rows are not made of answers that are cut off there."""

    def sampling(self, seed: int, n: int = 1, **options: Any) -> Sampling:
        """How answers are drawn."""
        return Sampling(self.max_new_tokens, self.temperature, self.top_p, n, seed, **options)


class JudgeConfig(Asks):
    """A generator that gives marks."""

    rubric: str = "It is correct, does what was asked for, and says nothing beside it."
    """What a good answer is."""
    best: int = Field(default=10, gt=1)
    """The best mark; the worst is 1."""
    max_new_tokens: int = Field(default=16, gt=0)
    """The maximum number of tokens in a mark."""
