"""The configs of the augmenters."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from luthier.api import Asks, Config, Field, JudgeConfig, RewardUse
from pydantic import field_validator, model_validator


class AnswerConfig(Asks):
    """Answers the rows' prompts: what rows say themselves in their last turn is left out."""

    system: str | None = None
    """What the generator is told beside each prompt; no part of the row that is made."""
    samples: int = Field(default=1, gt=0)
    """Answers to each prompt; several of them need a temperature."""
    choose: Literal["all", "best", "pairs"] = "all"
    """What becomes of several answers: each is a row, the best one is, or the best and the worst are a row of the
    schema `preference`."""
    judge: JudgeConfig | None = None
    """Who tells good answers from bad ones."""
    reward: RewardUse | None = None
    """The same, by a reward."""
    gap: float = Field(default=0.0, ge=0)
    """By how much the best has to be above the worst; a pair below it is no row."""

    @model_validator(mode="after")
    def _can_choose(self) -> AnswerConfig:
        if self.samples > 1 and not self.temperature:
            raise ValueError(f"at the temperature 0 all {self.samples} answers are the same: set `temperature`")
        if self.choose == "all":
            if self.judge is not None or self.reward is not None:
                raise ValueError("a judge or a reward is for `choose: best` or `choose: pairs`")
        elif (self.judge is None) == (self.reward is None):
            raise ValueError(f"`choose: {self.choose}` needs a `judge` or a `reward`: one of them")
        elif self.samples < 2:
            raise ValueError(f"`choose: {self.choose}` needs several `samples`")
        return self


class ParaphraseConfig(Asks):
    """Says the last turn of the user in other words; the answer stays."""

    temperature: float = Field(default=0.7, ge=0)
    """0 takes the likeliest token each time."""
    count: int = Field(default=1, gt=0)
    """Other wordings of each row."""
    instruction: str = (
        "Say the user's text in other words. Keep its meaning, its language, and all names, numbers and formats. "
        "Answer with the new text alone."
    )
    """What the generator is told."""

    @model_validator(mode="after")
    def _can_differ(self) -> ParaphraseConfig:
        if self.count > 1 and not self.temperature:
            raise ValueError(f"at the temperature 0 all {self.count} wordings are the same: set `temperature`")
        return self


class BackTranslateConfig(Asks):
    """Translates the last turn of the user, and back; the answer stays."""

    by_way_of: Annotated[list[str], Field(min_length=1)] = ["German"]
    """The languages in between: each gives a row."""
    language: str = "English"
    """The language of the rows."""


class SynthesizeConfig(Asks):
    """Writes new rows, each after a few examples from the rows (Self-Instruct, arXiv 2212.10560): those that are much
    like an older row are left out, and the others are examples too."""

    temperature: float = Field(default=1.0, gt=0)
    """The higher, the more unlike are rows."""
    instruction: str = Field(min_length=1)
    """What rows are for, and what makes a good one."""
    count: int = Field(gt=0)
    """How many rows to make."""
    examples: int = Field(default=4, gt=0)
    """Rows that are shown in each request."""
    similar: float = Field(default=0.7, gt=0, le=1)
    """The share of common runs of five words (Jaccard) from which on a row is like another."""
    structured: bool = False
    """Whether the server is given a JSON schema to hold the answer to, where it can."""


class EditsConfig(Config):
    """Edits the turns of the user; all else stays."""

    count: int = Field(default=1, gt=0)
    """Edited rows of each row."""
    typos: float = Field(default=0.03, ge=0, le=1)
    """The share of letters that are left out, doubled, swapped with the next one or hit beside (QWERTY)."""
    lower: float = Field(default=0.3, ge=0, le=1)
    """The share of turns without capitals."""
    upper: float = Field(default=0.0, ge=0, le=1)
    """The share of turns in capitals."""
    no_punctuation: float = Field(default=0.3, ge=0, le=1)
    """The share of turns without punctuation at their end."""

    @model_validator(mode="after")
    def _does_something(self) -> EditsConfig:
        if not (self.typos or self.lower or self.upper or self.no_punctuation):
            raise ValueError("no edit has a share above 0: rows would be repeated")
        return self


class FilterConfig(Config):
    """Keeps some of the rows; the others are in the ledger."""

    rule: str | None = None
    """A Jinja expression that is true of a good row, of `prompt` and `answer` (texts: the last turn before the
    answer, and the answer, or the whole text), and `row` (all columns), such as
    `answer | length < 500 and "http" not in answer`."""
    judge: JudgeConfig | None = None
    """Who gives each row's answer a mark."""
    reward: RewardUse | None = None
    """What gives each row's answer a score."""
    at_least: float | None = None
    """The mark or score that a good row has."""

    @field_validator("rule")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            # Only where there is a rule: a module of configs is cheap to import.
            from luthier_plugins.augmenters.rules import compiled

            compiled(value)
        return value

    @model_validator(mode="after")
    def _one_way(self) -> FilterConfig:
        given: list[Any] = [value for value in (self.rule, self.judge, self.reward) if value is not None]
        if len(given) != 1:
            raise ValueError("give a `rule`, a `judge` or a `reward`: one of them")
        if (self.rule is None) != (self.at_least is not None):
            raise ValueError("`at_least` goes with a `judge` or a `reward`, and they with it")
        return self
