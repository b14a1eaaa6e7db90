"""What answers over HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

from luthier.api.errors import ModelError
from luthier.api.serving import Completion, Generator, Request, Sampling
from luthier.serving.golden import ServerError, ask, model_of


class HttpGenerator(Generator[Any]):
    """A server with OpenAI's chat completions.

    Args:
        url: Its address, with or without ``/v1``.
        model: The name of the model; by default the server's first.
    """

    def __init__(self, url: str, model: str | None = None) -> None:
        self.url = url
        self._model = model

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Sequence[Completion]]:
        try:
            model = self._model or model_of(self.url)
            for messages in requests:
                yield [self._answer(list(messages), sampling, number, model) for number in range(sampling.n)]
        except ServerError as error:
            raise ModelError(str(error), hint="is the server running at this address?") from error

    def _answer(self, messages: list[Any], sampling: Sampling, number: int, model: str) -> Completion:
        settings = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed + number}
        reply = ask(self.url, messages, sampling.max_new_tokens, model, **settings)
        known = reply.finish_reason in ("stop", "length")
        return Completion(reply.text, reply.tokens, cast("Any", reply.finish_reason) if known else None)
