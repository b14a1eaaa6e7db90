"""How contexts reach plugins: the part of `luthier.api.Context` that is the same for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

from luthier.api.artifact import Artifact
from luthier.registry import Registry

if TYPE_CHECKING:
    from luthier.api.config import Use
    from luthier.api.context import Context
    from luthier.api.serving import Generator


class PluginAccess:
    """Makes components from a registry, each with this context.

    Args:
        registry: Where components are looked up.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def artifact(self, value: str | None) -> Artifact:
        """See `luthier.api.Context.artifact`."""
        raise NotImplementedError

    def artifacts(self, values: Sequence[str] | None) -> list[Artifact]:
        """See `luthier.api.Context.artifacts`."""
        return [self.artifact(value) for value in values or []]

    def build(self, use: Use) -> Any:
        """See `luthier.api.Context.build`."""
        return self._registry.build(use, self)

    def generator(self, artifact: Artifact, variant: str | None = None) -> AbstractContextManager[Generator[Any]]:
        """See `luthier.api.Context.generator`."""
        # Late, because it loads torch.
        from luthier.serving.generators import open_generator

        return open_generator(artifact, self._registry, cast("Context", self), variant)

    def collected(self, hook: str) -> Mapping[str, Any]:
        """See `luthier.api.Context.collected`."""
        return cast("Mapping[str, Any]", getattr(self._registry, hook)())
