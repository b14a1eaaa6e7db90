"""Compares a running server with what it should say: a golden file has prompts, their tokens and the greedy answers.

This file needs nothing but Python, and stands beside the golden file in a serving bundle::

    python check.py http://127.0.0.1:8080 golden.json
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 600
LEAST = 0.8
"""The share of answers that has to be the same; rounding in another program may turn a choice between equals."""


class ServerError(Exception):
    """The server cannot be reached, or does not answer as a server of this kind should."""


@dataclass(frozen=True)
class Verdict:
    """How one entry of a golden file came out.

    Attributes:
        question: The last message.
        tokens: How many tokens the server made of the prompt; None where it does not say.
        expected_tokens: How many there should be.
        answer: What it said.
        expected: What it should have said.
    """

    question: str
    tokens: int | None
    expected_tokens: int
    answer: str
    expected: str

    @property
    def same_prompt(self) -> bool:
        """Whether the prompt has as many tokens as it should: a wrong template or a doubled first token shows here."""
        return self.tokens is None or self.tokens == self.expected_tokens

    @property
    def same_answer(self) -> bool:
        return self.answer == self.expected


@dataclass(frozen=True)
class Reply:
    """What a server answered; None where it does not say."""

    text: str
    prompt_tokens: int | None
    tokens: int | None
    finish_reason: str | None


def completions_url(url: str) -> str:
    """Where a server is asked, from its address with or without ``/v1``."""
    return f"{url.rstrip('/').removesuffix('/v1')}/v1/chat/completions"


def opened(url: str, body: dict[str, Any] | None = None) -> Any:
    """Ask a server over HTTP.

    Raises:
        ServerError: it cannot be reached, or refuses.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    # The environment's proxies are not used for a server on this machine.
    host = urllib.parse.urlsplit(url).hostname
    local = host in ("127.0.0.1", "localhost", "::1")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({})) if local else urllib.request.build_opener()
    try:
        return opener.open(request, timeout=SECONDS)
    except urllib.error.HTTPError as error:
        raise ServerError(f"{url} refused: {error.code} {error.read().decode(errors='replace')[:500]}") from error
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise ServerError(f"{url} cannot be reached: {error}") from error


def model_of(url: str, wanted: str = "") -> str:
    """The name of the wanted model as the server has it, or of its first; empty where it does not say."""
    try:
        with opened(f"{url.rstrip('/').removesuffix('/v1')}/v1/models") as reply:
            names = [str(model["id"]) for model in json.load(reply)["data"]]
        # Ollama appends a tag to it.
        return next((name for name in names if name.partition(":")[0] == wanted), names[0])
    except (ServerError, LookupError, TypeError, ValueError):
        return ""


def ask(url: str, messages: list[Any], limit: int, model: str = "", **settings: Any) -> Reply:
    """Ask for an answer, by default the greedy one.

    Args:
        url: The server's address.
        messages: The conversation.
        limit: The most tokens of the answer.
        model: What the server calls the model.
        **settings: What else the request says, such as ``temperature``.

    Raises:
        ServerError: there is no answer.
    """
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": limit, "seed": 0, **settings}
    with opened(completions_url(url), body) as reply:
        try:
            content: dict[str, Any] = json.load(reply)
            choice: dict[str, Any] = content["choices"][0]
        except (LookupError, TypeError, ValueError, OSError, http.client.HTTPException) as error:
            raise ServerError(f"{url} does not answer like an OpenAI-compatible server: {error}") from error
    usage: dict[str, Any] = content.get("usage") or {}
    text = choice["message"].get("content") or ""
    return Reply(text, usage.get("prompt_tokens"), usage.get("completion_tokens"), choice.get("finish_reason"))


def streamed(url: str, messages: list[dict[str, str]], limit: int, model: str = "") -> Iterator[str]:
    """A greedy answer piece by piece, as the server says it.

    Raises:
        ServerError: there is no answer.
    """
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": limit, "stream": True}
    with opened(completions_url(url), body) as reply:
        try:
            for line in reply:
                text = line.decode().strip()
                if text == "data: [DONE]":
                    return
                if not text.startswith("data:"):
                    continue
                event: dict[str, Any] = json.loads(text.removeprefix("data:"))
                if "error" in event:
                    raise ServerError(f"{url} fails: {event['error']}")
                choices: list[dict[str, Any]] = event.get("choices") or []
                if choices:
                    yield choices[0].get("delta", {}).get("content") or ""
        except (ValueError, OSError, http.client.HTTPException) as error:
            raise ServerError(f"{url} stopped answering: {error}") from error
    raise ServerError(f"{url} stopped in the middle of an answer")


def verify(url: str, golden: dict[str, Any]) -> Iterator[Verdict]:
    """Ask a server everything that a golden file has.

    Raises:
        ServerError: it cannot be asked.
    """
    model = model_of(url, golden.get("model", ""))
    for entry in golden["entries"]:
        reply = ask(url, entry["messages"], golden["max_tokens"], model)
        question = entry["messages"][-1]["content"]
        yield Verdict(question, reply.prompt_tokens, len(entry["prompt_ids"]), reply.text, entry["answer"])


def problem_of(verdicts: list[Verdict], least: float) -> str | None:
    """What is wrong with a server, if anything is."""
    if not verdicts:
        return "the golden file has no entries: the model has no chat template"
    odd = [verdict for verdict in verdicts if not verdict.same_prompt]
    if odd:
        first = odd[0]
        return (
            f"{len(odd)} of {len(verdicts)} prompts became other tokens: {first.tokens} instead of "
            f"{first.expected_tokens} for {first.question!r}; the chat template or the first token differs"
        )
    same = sum(verdict.same_answer for verdict in verdicts)
    if same < least * len(verdicts):
        return f"only {same} of {len(verdicts)} answers are the same, {least:.0%} are expected"
    return None


def main() -> None:
    """Entry point of the file itself."""
    parser = argparse.ArgumentParser(description="Compare a running server with a golden file.")
    parser.add_argument("url")
    parser.add_argument("golden", type=Path)
    options = parser.parse_args()
    golden = json.loads(options.golden.read_text(encoding="utf-8"))
    try:
        verdicts = list(verify(options.url, golden))
    except ServerError as error:
        sys.exit(str(error))
    for verdict in verdicts:
        print(f"{'same ' if verdict.same_answer else 'OTHER'}  {verdict.question!r} -> {verdict.answer!r}")
    problem = problem_of(verdicts, golden["least"])
    if problem:
        sys.exit(problem)
    print(f"{sum(verdict.same_answer for verdict in verdicts)} of {len(verdicts)} answers are the same")


if __name__ == "__main__":
    main()
