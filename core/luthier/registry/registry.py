"""Loads plugins through entry points and answers which component a name stands for."""

from __future__ import annotations

import difflib
import logging
import os
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, cast

import pluggy

from luthier.api.component import Component, Kind
from luthier.api.errors import PluginError
from luthier.api.hooks import Hooks

if TYPE_CHECKING:
    import click

    from luthier.api.config import Config

GROUP = "luthier"
STRICT = "LUTHIER_STRICT_PLUGINS"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Provider:
    """Who hands over a component: a plugin (entry point) of an installed distribution."""

    plugin: str
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"


@dataclass(frozen=True, slots=True)
class BrokenPlugin:
    """A plugin that could not be loaded, and why."""

    provider: Provider
    error: str
    details: str


class Registry:
    """The components of all installed plugins.

    A plugin that fails to load is kept aside in `broken` and fails only what needs it, unless the
    environment variable ``LUTHIER_STRICT_PLUGINS`` is ``1``.
    """

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager("luthier")
        self.manager.add_hookspecs(Hooks)
        self.broken: list[BrokenPlugin] = []
        self._offers: dict[tuple[Kind, str], list[tuple[Component, Provider]]] = {}
        self._strict = os.environ.get(STRICT) == "1"

    @classmethod
    def installed(cls) -> Registry:
        """The registry of every plugin installed in this environment."""
        registry = cls()
        for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
            registry.load(point)
        return registry

    def load(self, point: EntryPoint) -> None:
        """Load one plugin; when it fails, keep the error instead (or raise, in strict mode)."""
        distribution = point.dist
        provider = Provider(
            point.name,
            distribution.name if distribution else point.module,
            distribution.version if distribution else "?",
        )
        try:
            self.add(point.load(), provider)
        # A plugin is foreign code: whatever it raises must not take the others down.
        except Exception as error:
            if self._strict:
                raise PluginError(f"the plugin '{provider.plugin}' of {provider} cannot be loaded: {error}") from error
            text = f"{type(error).__name__}: {error}"
            self.broken.append(BrokenPlugin(provider, text, traceback.format_exc()))

    def add(self, plugin: object, provider: Provider) -> None:
        """Register a plugin object (a module, or an instance) and take in its components.

        Raises:
            PluginError: it implements no known hook, or hands over something else than components.
        """
        name = f"{provider.distribution}:{provider.plugin}"
        self.manager.register(plugin, name=name)
        try:
            self.manager.check_pending()
            if not self.manager.get_hookcallers(plugin):
                raise PluginError("the plugin implements no hook", hint="mark its functions with @hookimpl")
            offers = list(self._components_of(plugin))
        except BaseException:
            self.manager.unregister(plugin)
            raise
        for component in offers:
            self._offers.setdefault((component.kind, component.name), []).append((component, provider))

    def _components_of(self, plugin: object) -> Iterator[Component]:
        hook = getattr(plugin, "luthier_components", None)
        if hook is None:
            return
        for component in hook():
            if not isinstance(component, Component):
                raise PluginError(f"luthier_components() gave {component!r}, which is not a Component")
            yield component

    def get(self, kind: Kind, name: str) -> Component:
        """The component of that kind and name.

        Raises:
            PluginError: nobody provides it (with the nearest names), or more than one does.
        """
        return self._offer(kind, name)[0]

    def provider(self, component: Component) -> Provider:
        """Who provides a component."""
        return self._offer(component.kind, component.name)[1]

    def _offer(self, kind: Kind, name: str) -> tuple[Component, Provider]:
        offers = self._offers.get((kind, name), [])
        if len(offers) == 1:
            return offers[0]
        if offers:
            names = " and ".join(str(provider) for _, provider in offers)
            raise PluginError(f"{names} both provide the {kind} '{name}'", hint="uninstall one of them")
        known = self.names(kind)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(known) or 'none'}"
        if self.broken:
            names = ", ".join(plugin.provider.distribution for plugin in self.broken)
            hint += f"; some plugins could not be loaded ({names}): see `luthier plugins`"
        raise PluginError(f"there is no {kind} '{name}'", hint=hint)

    def names(self, kind: Kind) -> list[str]:
        """The names of all components of a kind."""
        return sorted(name for other, name in self._offers if other == kind)

    def __iter__(self) -> Iterator[tuple[Component, Provider]]:
        for offers in self._offers.values():
            yield from offers

    def config_class(self, component: Component) -> type[Config]:
        """Import the component's config class.

        Raises:
            PluginError: it cannot be imported.
        """
        return self._import(component, component.config)

    def impl_class(self, component: Component) -> type[Any]:
        """Import the component's implementation; in the worker only, since it may load torch."""
        return self._import(component, component.impl)

    def _import(self, component: Component, reference: str) -> Any:
        module, _, name = reference.partition(":")
        try:
            return getattr(import_module(module), name)
        except Exception as error:
            raise PluginError(
                f"the {component.kind} '{component.name}' of {self.provider(component)} cannot be loaded: "
                f"{type(error).__name__}: {error}",
                where=reference,
            ) from error

    def commands(self) -> Iterator[click.Command]:
        """The command-line verbs of plugins; one that fails is logged, or raises in strict mode."""
        for implementation in self.manager.hook.luthier_commands.get_hookimpls():
            try:
                yield from cast("Any", implementation.function)()
            except Exception:
                if self._strict:
                    raise
                logger.exception("the plugin %s failed in luthier_commands", implementation.plugin_name)

    def notify(self, hook: str, **arguments: Any) -> None:
        """Call an observer hook in every plugin; an error is logged and never ends a run."""
        for implementation in getattr(self.manager.hook, hook).get_hookimpls():
            values: Mapping[str, Any] = {name: arguments[name] for name in implementation.argnames}
            try:
                implementation.function(**values)
            except Exception:
                if self._strict:
                    raise
                logger.exception("the plugin %s failed in %s", implementation.plugin_name, hook)


@cache
def default_registry() -> Registry:
    """The registry of this process."""
    return Registry.installed()
