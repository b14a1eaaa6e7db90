"""The generator ``openai``."""

from __future__ import annotations

import json
import os
import random
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import openai
from luthier.api import Completion, Context, Generator, ModelError, Request, Sampling
from luthier.api.data import Conversation
from luthier_plugins.generators.config import OpenAIConfig

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 60.0
LONGEST_WAIT = 600.0
"""Seconds that a server may ask to wait."""
SHOWN = 200
"""Characters of what a server says that are shown."""
AGAIN = frozenset((408, 409, 425, 429))
REFUSED = frozenset((400, 413, 422))
"""What is wrong with one request; the next may well be answered."""


class _Again(Exception):
    """A request that may be answered when it is tried again."""

    def __init__(self, problem: str, after: float | None = None) -> None:
        super().__init__(problem)
        self.after = after


class OpenAI(Generator[OpenAIConfig]):
    """The generator ``openai``."""

    def __init__(self, config: OpenAIConfig, context: Context) -> None:
        super().__init__(config, context)
        place = urlsplit(config.url)
        self._url = config.url.rstrip("/") + ("" if place.path.strip("/") else "/v1")
        self._official = place.hostname == "api.openai.com"
        self._key = os.environ.get(config.key_from, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ModelError(
                f"what the environment variable {config.key_from} holds is no key: a key has no line breaks, and ASCII "
                "characters alone",
                hint="set it anew",
            )
        # The environment's proxies are not asked for servers on this machine. Retries are this class's own: the
        # client would sleep through the user's wish to stop, and repeats nothing that is broken in the middle.
        local = place.hostname in ("127.0.0.1", "localhost", "::1")
        self._client = openai.OpenAI(
            base_url=self._url,
            api_key=self._key or "none",
            timeout=config.timeout,
            max_retries=0,
            http_client=openai.DefaultHttpxClient(trust_env=not local),
        )
        self._model = config.model
        self._answered = False
        self._stop = threading.Event()
        self._input = self._output = 0
        self._uncounted = False

    @property
    def at_once(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.config.at_once

    @property
    def answers_as(self) -> str | None:
        who = ["openai", self._url, self._named(), self.config.settings]
        return json.dumps(who, sort_keys=True)

    def account(self, completion: Completion) -> str:
        """Add up tokens and money, see `Generator.account`."""
        self._input += completion.prompt_tokens or 0
        self._output += completion.tokens or 0
        self._uncounted = self._uncounted or completion.tokens is None
        money = self._money
        return f"{self._input + self._output} tokens" + (f", cost {money:.4f}" if money is not None else "")

    @property
    def _money(self) -> float | None:
        price = self.config.price
        return None if price is None else (self._input * price.input + self._output * price.output) / 1e6

    def may_ask(self) -> None:
        budget, tokens, money = self.config.budget, self._input + self._output, self._money
        if budget is None:
            return
        if self._uncounted:
            raise ModelError(
                f"{self._url} does not say how many tokens its answers have: a budget cannot be kept",
                hint="leave `budget` out, and watch what it costs",
            )
        if budget.tokens is not None and tokens >= budget.tokens:
            raise ModelError(f"the budget is spent: {tokens} of {budget.tokens} tokens", hint="raise `budget.tokens`")
        if budget.money is not None and money is not None and money >= budget.money:
            raise ModelError(f"the budget is spent: {money:.4f} of {budget.money}", hint="raise `budget.money`")

    def give_up(self) -> None:
        self._stop.set()

    def close(self) -> None:
        self._stop.set()
        self._client.close()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Sequence[Completion]]:
        for request in requests:
            yield [self._answer(request, sampling, number) for number in range(sampling.n)]

    def _named(self) -> str:
        if self._model is None:
            models = self._tried(lambda: list(self._client.models.list()))
            if not models:
                raise ModelError(f"{self._url} serves no model", hint="name one with `model`")
            self._model = models[0].id
        return self._model

    def _answer(self, request: Request, sampling: Sampling, number: int) -> Completion:
        talk = Conversation.of(request)
        body: dict[str, Any] = {
            "model": self._named(),
            "messages": _sent(talk),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed + number,
            # OpenAI's newer models refuse the older name, other servers do not know the newer.
            "max_completion_tokens" if self._official else "max_tokens": sampling.max_new_tokens,
        }
        if talk.tools:
            body["tools"] = talk.tools
        if sampling.json_schema is not None:
            schema = {"name": "answer", "strict": True, "schema": dict(sampling.json_schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        body |= self.config.settings
        extra = {key: value for key, value in body.items() if value is not None and key not in ("model", "messages")}

        def ask() -> Completion:
            reply: Any = self._client.chat.completions.create(
                model=body["model"], messages=body["messages"], extra_body=extra
            )
            return _completion(reply)

        try:
            return self._tried(ask)
        except openai.APIStatusError as error:
            return Completion("", finish_reason="refused", problem=self._said(error))

    def _tried(self, ask: Any) -> Any:
        """What a call returns, tried again where that may help.

        Raises:
            openai.APIStatusError: the server refuses this one request.
            ModelError: it cannot be asked.
        """
        for attempt in range(self.config.retries + 1):
            try:
                result = self._once(ask)
            except _Again as error:
                if self._stop.is_set() or attempt == self.config.retries:
                    raise ModelError(
                        f"{self._url} does not answer after {attempt + 1} tries: {error}",
                        hint="is it running, and not overloaded? `at_once`, `retries` and `timeout` can be set",
                    ) from error
                pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt) * random.uniform(0.75, 1.25)
                if self._stop.wait(error.after if error.after is not None else pause):
                    raise ModelError(f"{self._url} was not asked again: {error}") from error
            else:
                self._answered = True
                return result
        raise AssertionError("the last try returns or raises")

    def _once(self, ask: Any) -> Any:
        try:
            return ask()
        except openai.APITimeoutError as error:
            raise _Again(f"nothing came in {self.config.timeout:g} s") from error
        except openai.APIConnectionError as error:
            cause = _first_cause(error)
            if isinstance(cause, (ConnectionRefusedError, socket.gaierror)) and not self._answered:
                raise ModelError(
                    f"{self._url} cannot be reached: {cause}", hint="is the server running at this address?"
                ) from error
            raise _Again(f"the connection broke: {self._hidden(str(cause))}") from error
        except openai.APIStatusError as error:
            raise self._of_status(error) from error
        except (openai.APIError, ValueError, AttributeError, TypeError, IndexError) as error:
            # Of a reply that is no JSON, or JSON of another shape, the client makes what it can.
            raise _Again(f"it sent no chat completion ({self._hidden(str(error))[:SHOWN]})") from error

    def _of_status(self, error: openai.APIStatusError) -> Exception:
        """What an HTTP status means: this request alone, another try, or the end."""
        said = self._said(error)
        if error.status_code in REFUSED:
            return error
        if error.status_code in AGAIN or error.status_code >= 500:
            after = _retry_after(error.response.headers)
            if getattr(error, "code", None) == "insufficient_quota" or (after or 0) > LONGEST_WAIT:
                wait = f"; it asks to wait {after:.0f} s" if after else ""
                return ModelError(f"{self._url} answers no more: {said}{wait}", hint="run again later")
            return _Again(f"{error.status_code}: {said}", after)
        if error.status_code in (401, 403):
            key = "is refused" if self._key else "is missing"
            return ModelError(
                f"the key for {self._url} {key}: {said}", hint=f"set the environment variable {self.config.key_from}"
            )
        return ModelError(f"{self._url} answers {error.status_code}: {said}", hint="are `url` and `model` right?")

    def _said(self, error: openai.APIStatusError) -> str:
        body: Any = error.body
        text = body.get("message") if isinstance(body, Mapping) else None
        return self._hidden(str(text or error.response.text or error.message)).strip()[:SHOWN]

    def _hidden(self, text: str) -> str:
        """A text without the key, should a server repeat it."""
        return text.replace(self._key, "***") if self._key else text


def _first_cause(error: BaseException) -> BaseException:
    """What an error began with: the client has its HTTP library's errors, and that has the system's."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def _sent(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as the protocol has them: without what only training asks for, calls with arguments as text and with
    ids, which their results name."""
    known = ("role", "content", "tool_calls", "tool_call_id", "name")
    made: list[dict[str, Any]] = []
    open_ids: list[str] = []
    for number, message in enumerate(messages):
        sent = {key: message[key] for key in known if message.get(key) is not None}
        if "tool_calls" in sent:
            open_ids = [
                str(call.get("id") or f"call_{number}_{place}") for place, call in enumerate(sent["tool_calls"])
            ]
            sent["tool_calls"] = [
                {"id": name, "type": "function", "function": {**call["function"], "arguments": _as_text(call)}}
                for name, call in zip(open_ids, sent["tool_calls"], strict=True)
            ]
        elif message["role"] == "tool":
            name = sent.get("tool_call_id") or (open_ids[0] if open_ids else f"call_{number}")
            open_ids = [other for other in open_ids if other != name]
            sent["tool_call_id"] = name
        made.append(sent)
    return made


def _as_text(call: Mapping[str, Any]) -> str:
    arguments = call["function"].get("arguments") or {}
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _completion(reply: Any) -> Completion:
    choice = reply.choices[0]
    message, usage = choice.message, reply.usage
    reason = choice.finish_reason
    extra: Mapping[str, Any] = message.model_extra or {}
    thinking = extra.get("reasoning_content") or extra.get("reasoning") or ""
    if reason == "content_filter":
        return Completion("", finish_reason="refused", problem="the server's content filter")
    if message.tool_calls:
        return Completion("", finish_reason="refused", problem="it called a tool, of which no text can be made")
    if message.content is not None and not isinstance(message.content, str):
        raise TypeError(f"the answer is {type(message.content).__name__}, no text")
    return Completion(
        message.content or "",
        usage.completion_tokens if usage else None,
        reason if reason in ("stop", "length") else None,
        thinking if isinstance(thinking, str) else "",
        usage.prompt_tokens if usage else None,
    )


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a server asks to wait: a number, or a date (RFC 9110, section 10.2.3)."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if seconds == seconds else None
