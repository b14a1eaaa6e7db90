"""The hook marker for plugins, and the hooks they can implement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import click

    from luthier.api.component import Component
    from luthier.api.serving import ToolEnvironment

hookimpl = pluggy.HookimplMarker("luthier")
hookspec = pluggy.HookspecMarker("luthier")


class Hooks:
    """The hooks. None is ``firstresult``; none may depend on the order of calls."""

    @hookspec
    def luthier_components(self) -> Iterable[Component]:
        """Hand over this plugin's components."""
        raise AssertionError("a hook specification is never called")

    @hookspec
    def luthier_commands(self) -> Iterable[click.Command]:
        """Hand over verbs for the command line."""
        raise AssertionError("a hook specification is never called")

    @hookspec
    def luthier_gguf_architectures(self) -> Mapping[str, str]:
        """Hand over converters to GGUF: ``module:Class`` by the architecture's name in ``config.json``.

        The class follows `luthier.serving.gguf.Architecture`. Two plugins with one architecture are an error.
        """
        raise AssertionError("a hook specification is never called")

    @hookspec
    def luthier_tool_environments(self) -> Iterable[ToolEnvironment]:
        """Hand over tools that get their own environment, see ``luthier doctor``."""
        raise AssertionError("a hook specification is never called")

    @hookspec
    def luthier_stage_started(self, stage: str, key: str) -> None:
        """A stage starts to run (it was not cached)."""

    @hookspec
    def luthier_stage_finished(self, stage: str, key: str, manifest: Mapping[str, Any]) -> None:
        """A stage's artifact is in the store."""

    @hookspec
    def luthier_stage_failed(self, stage: str, key: str, error: str) -> None:
        """A stage failed; its scratch folder is kept."""

    @hookspec
    def luthier_metrics_logged(self, stage: str, metrics: Mapping[str, float], step: int) -> None:
        """A stage logged metrics, such as the training loss at a step."""
