"""The generator ``model``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from luthier.api import Completion, Context, Generator, ModelError, Request, Sampling
from luthier_plugins.generators.config import ModelGeneratorConfig


class ModelGenerator(Generator[ModelGeneratorConfig]):
    """A model of the recipe, loaded when it is first asked."""

    def __init__(self, config: ModelGeneratorConfig, context: Context) -> None:
        super().__init__(config, context)
        self._stack = ExitStack()
        self._inner: Generator[Any] | None = None

    @property
    def answers_as(self) -> str | None:
        artifact = self.context.artifact(self.config.model)
        return json.dumps(["model", artifact.key, self.config.variant, str(self.context.date)])

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Sequence[Completion]]:
        if sampling.json_schema is not None:
            raise ModelError(
                "a model of the recipe cannot hold answers to a JSON schema",
                hint="export it to GGUF and take the generator 'llama', or ask for JSON in words",
            )
        if self._inner is None:
            artifact = self.context.artifact(self.config.model)
            self._inner = self._stack.enter_context(self.context.generator(artifact, self.config.variant))
        yield from self._inner.generate(requests, sampling)

    def close(self) -> None:
        self._inner = None
        self._stack.close()
