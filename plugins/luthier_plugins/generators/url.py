"""The generator ``url``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from luthier.api import Completion, Generator, Request, Sampling
from luthier.serving.http_generator import HttpGenerator
from luthier_plugins.generators.config import UrlConfig


class Url(Generator[UrlConfig]):
    """A server over HTTP."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Sequence[Completion]]:
        yield from HttpGenerator(self.config.url, self.config.model).generate(requests, sampling)
