"""Plugins that a test writes in its own file."""

from __future__ import annotations

from typing import Any

from luthier.api import Component, hookimpl


class OnePlugin:
    """Hands over one component whose classes stand in a test's module.

    Only for stages that run in the test's own process: a worker cannot import the test.
    """

    def __init__(self, kind: str, name: str, config: type[Any], impl: type[Any], *, revision: int = 1) -> None:
        self.component = Component(
            kind=kind,
            name=name,
            summary=f"The {kind} of a test",
            config=f"{config.__module__}:{config.__qualname__}",
            impl=f"{impl.__module__}:{impl.__qualname__}",
            revision=revision,
        )

    @hookimpl
    def luthier_components(self) -> list[Component]:
        return [self.component]
