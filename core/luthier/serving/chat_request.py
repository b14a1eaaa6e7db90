"""What a request to OpenAI's chat completions asks for: each of its fields is honoured, or refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

USUAL_ANSWER = 256
"""Tokens of an answer, at most, where the request does not say."""
MOST_ANSWERS = 16
MOST_STOPS = 16
LARGEST_SEED = 1 << 63
IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""Fields that say who asks, and change no answer."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
"""Fields that are known here in these values only, in which they ask for nothing."""
MESSAGE = ("role", "content")


class RequestError(ValueError):
    """A request that cannot be honoured.

    Attributes:
        status: HTTP's number for the reason.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request.

    Attributes:
        messages: The conversation, as it was sent, but for contents in parts of text, which are one text.
        limit: The most tokens of an answer.
        temperature: 0 is greedy.
        top_p: The probability of the tokens that are drawn from; 0 is greedy, too.
        n: How many answers.
        seed: With the same one, the answers are the same; None: any.
        stop: Texts before which an answer ends.
        stream: Whether it is sent piece by piece.
        usage: Whether a stream ends with the numbers of tokens.
    """

    messages: list[Any]
    limit: int
    temperature: float
    top_p: float
    n: int
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    usage: bool

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken always."""
        return self.temperature == 0 or self.top_p == 0


def chat_request(body: Mapping[str, Any], model: str) -> ChatRequest:
    """Read the body of a request.

    Args:
        body: The body.
        model: What the model is called.

    Raises:
        RequestError: a field asks for what there is not, or has no value that it may have.
    """
    given = {name: value for name, value in body.items() if value is not None and name not in IGNORED}
    wanted = given.pop("model", "")
    if wanted not in ("", model):
        raise RequestError(f"there is no model {wanted!r}, only {model!r}", 404)
    for name, values in NEUTRAL.items():
        value = given.pop(name, None)
        if value is not None and not any(_same(value, known) for known in values):
            raise RequestError(f"`{name}` cannot be honoured here: leave it out")
    messages = _messages(given.pop("messages", None))
    limits = {given.pop(name, None) for name in ("max_tokens", "max_completion_tokens")} - {None}
    if len(limits) > 1:
        raise RequestError("`max_tokens` and `max_completion_tokens` are two names for one limit, and differ")
    stream = _flag("stream", given.pop("stream", False))
    options = given.pop("stream_options", {})
    if not isinstance(options, dict):
        raise RequestError("`stream_options` is not an object")
    options = dict(cast("dict[str, Any]", options))
    if options and not stream:
        raise RequestError("`stream_options` belongs to `stream: true`")
    usage = _flag("include_usage", options.pop("include_usage", False))
    found = ChatRequest(
        messages=messages,
        limit=_whole("max_tokens", limits.pop() if limits else USUAL_ANSWER, 1, 1 << 31),
        temperature=_number("temperature", given.pop("temperature", 0.0), 0.0, 100.0),
        top_p=_number("top_p", given.pop("top_p", 1.0), 0.0, 1.0),
        n=_whole("n", given.pop("n", 1), 1, MOST_ANSWERS),
        seed=_whole("seed", given["seed"], -LARGEST_SEED, LARGEST_SEED - 1) if "seed" in given else None,
        stop=_stops(given.pop("stop", [])),
        stream=stream,
        usage=usage,
    )
    given.pop("seed", None)
    unknown = [*given, *(f"stream_options.{name}" for name in options)]
    if unknown:
        raise RequestError(f"`{unknown[0]}` is no field that is known here: leave it out")
    if found.stream and found.n > 1:
        raise RequestError("several answers are not streamed: leave `stream` out, or `n`")
    return found


def _same(value: Any, known: Any) -> bool:
    """Whether two values are the same in JSON, in which true is no number."""
    return value == known and isinstance(value, bool) == isinstance(known, bool)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"`{name}` is {value!r}, neither true nor false")
    return value


def _number(name: str, value: Any, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RequestError(f"`{name}` is {value!r}, not a number")
    if not least <= value <= most:
        raise RequestError(f"`{name}` is {value!r}, not between {least:g} and {most:g}")
    return float(value)


def _whole(name: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"`{name}` is {value!r}, not a whole number")
    if not least <= value <= most:
        raise RequestError(f"`{name}` is {value}, not between {least} and {most}")
    return value


def _stops(value: Any) -> tuple[str, ...]:
    several: list[Any] = cast("list[Any]", value) if isinstance(value, list) else [value]
    if len(several) > MOST_STOPS or not all(isinstance(text, str) and text for text in several):
        raise RequestError(f"`stop` is a text, or a list of up to {MOST_STOPS} texts, none of them empty")
    return tuple(several)


def _messages(value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise RequestError("`messages` is not a list of messages")
    return [_message(message, place) for place, message in enumerate(cast("list[Any]", value))]


def _message(message: Any, place: int) -> Any:
    """A message with one text; OpenAI's clients may send it in parts."""
    if not isinstance(message, dict):
        raise RequestError(f"message {place} is not an object")
    found = {name: value for name, value in cast("dict[str, Any]", message).items() if value not in (None, [])}
    unknown = [name for name in found if name not in MESSAGE]
    if unknown:
        raise RequestError(f"message {place} has `{unknown[0]}`, which the model would not be told")
    content: Any = found.get("content")
    if not isinstance(content, list):
        return found
    texts: list[str] = []
    for part in cast("list[Any]", content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind: Any = cast("dict[str, Any]", part).get("type") if isinstance(part, dict) else part
            raise RequestError(f"message {place} has a part that is no text ({kind!r}): only texts are understood")
        texts.append(part["text"])
    return {**found, "content": "".join(texts)}
