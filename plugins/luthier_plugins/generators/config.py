"""The configs of the generators."""

from __future__ import annotations

from typing import Annotated, Any

from luthier.api import Config, Field, Input
from luthier.api.config import NotIdentity
from pydantic import model_validator


class ModelGeneratorConfig(Config):
    """Something that a recipe makes."""

    model: Annotated[str, Input(("model", "adapter", "export"))]
    """The model or adapter, computed by transformers; or an export, asked in the program it is made for."""
    variant: str | None = None
    """Which file of an export; by default its last."""


class Price(Config):
    """What a server asks for a million tokens, in any currency."""

    input: float = Field(ge=0)
    """For those of requests."""
    output: float = Field(ge=0)
    """For those of answers."""


class Budget(Config):
    """What all answers that a stage uses may cost together, those that are kept from earlier runs included. Answers
    that are under way when it is spent still come, and are kept."""

    tokens: Annotated[int | None, Field(gt=0)] = None
    """Tokens of requests and answers."""
    money: Annotated[float | None, Field(gt=0)] = None
    """In the currency of `price`."""


class OpenAIConfig(Config):
    """A server with OpenAI's chat completions, asked through OpenAI's own client. Who answers at an address is not
    part of any key: artifacts and answers stay cached when the server changes."""

    url: str = Field(default="https://api.openai.com/v1", pattern=r"https?://.+")
    """Its address; where it has no path, ``/v1`` is added."""
    model: str | None = None
    """What it calls the model; by default its first."""
    settings: dict[str, Any] = {}
    """Further fields of each request, such as ``reasoning_effort``; null leaves one out that would be sent."""
    key_from: Annotated[str, NotIdentity()] = "OPENAI_API_KEY"
    """The environment variable with the key; recipes hold none."""
    at_once: Annotated[int, Field(gt=0), NotIdentity()] = 8
    """How many requests are under way at the same time."""
    timeout: Annotated[float, Field(gt=0), NotIdentity()] = 120.0
    """The seconds after which an answer that does not come is asked for again."""
    retries: Annotated[int, Field(ge=0), NotIdentity()] = 6
    """How often a request is tried again: after 429 and 5xx, when nothing comes, or something that is no answer. The
    pauses double, from half a second on; a server that says how long to wait is obeyed."""
    price: Annotated[Price | None, NotIdentity()] = None
    """What a million tokens cost; then the cost is shown."""
    budget: Annotated[Budget | None, NotIdentity()] = None
    """What the answers may cost; then the stage stops, and all that was paid for is kept."""

    @model_validator(mode="after")
    def _money_has_a_price(self) -> OpenAIConfig:
        if self.budget is not None and self.budget.money is not None and self.price is None:
            raise ValueError("a budget in money needs the `price` of a million tokens")
        return self
