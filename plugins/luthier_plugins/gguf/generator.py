"""The generator ``llama``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib.metadata import version

from luthier.api import Completion, Context, DataError, Generator, Request, Sampling
from luthier.api.data import Conversation
from luthier_plugins.gguf.config import LlamaConfig
from luthier_plugins.gguf.server import LlamaServer


class Llama(Generator[LlamaConfig]):
    """A GGUF file, loaded when it is first asked."""

    def __init__(self, config: LlamaConfig, context: Context) -> None:
        super().__init__(config, context)
        self._stack = ExitStack()
        self._server: LlamaServer | None = None

    @property
    def answers_as(self) -> str | None:
        path = self.context.path(self.config.path).resolve()
        about = path.stat()
        return json.dumps(["llama", str(path), about.st_size, about.st_mtime_ns, version("xllamacpp")])

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Sequence[Completion]]:
        if self._server is None:
            path = self.context.path(self.config.path)
            self._server = self._stack.enter_context(LlamaServer(path, context_length=self.config.context_length))
        for request in requests:
            if Conversation.of(request).tools:
                problem = "it has tools, which the generator 'llama' does not tell"
                yield [Completion("", finish_reason="refused", problem=problem)] * sampling.n
                continue
            try:
                yield from self._server.generate([request], sampling)
            except DataError as error:
                # One request that llama.cpp would misread; the others can be asked.
                yield [Completion("", finish_reason="refused", problem=str(error))] * sampling.n

    def close(self) -> None:
        self._server = None
        self._stack.close()
