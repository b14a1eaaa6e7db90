"""Loads plugins through entry points; looks up, validates and makes components."""

from __future__ import annotations

import difflib
import inspect
import logging
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pluggy

from luthier.api.component import Component, Kind
from luthier.api.errors import LuthierError, PluginError
from luthier.api.hooks import Hooks
from luthier.api.kinds import KINDS

if TYPE_CHECKING:
    import click

    from luthier.api.config import Config, Use
    from luthier.api.serving import ToolEnvironment

GROUP = "luthier"
STRICT = "LUTHIER_STRICT_PLUGINS"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Provider:
    """Who provides a component: a plugin (entry point) of an installed distribution."""

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
            if component.kind not in KINDS:
                raise PluginError(
                    f"'{component.name}' has the unknown kind '{component.kind}'", hint=_near(component.kind, KINDS)
                )
            yield component

    def get(self, kind: Kind, name: str) -> Component:
        """The component of that kind and name.

        Raises:
            PluginError: no plugin provides it (with the nearest names), or more than one does.
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
        hint = _near(name, self.names(kind))
        if self.broken:
            names = ", ".join(plugin.provider.distribution for plugin in self.broken)
            hint += f"; some plugins could not be loaded ({names}): see `luthier plugins`"
        raise PluginError(f"there is no {kind} '{name}'", hint=hint)

    def names(self, kind: Kind) -> list[str]:
        """The names of all components of a kind.

        Raises:
            ValueError: there is no such kind.
        """
        if kind not in KINDS:
            raise ValueError(f"there is no kind '{kind}'")
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
        """Import the component's implementation: in the worker, or where its kind says that it is light.

        Raises:
            PluginError: it cannot be imported, takes no context, or lacks what its kind has.
        """
        impl = self._import(component, component.impl)
        mine = f"the {component.kind} '{component.name}' of {self.provider(component)}"
        protocol = KINDS[component.kind].protocol_class
        parent = f"derive it from {protocol.__module__}.{protocol.__name__}"
        try:
            inspect.signature(impl).bind(None, None)
        except TypeError as error:
            raise PluginError(
                f"{mine} cannot be made: its class takes {inspect.signature(impl)}, not (config, context)",
                where=component.impl,
                hint=f"{parent}, and leave __init__ out or call its own",
            ) from error
        lacking = sorted(name for name in members(protocol) if not hasattr(impl, name))
        lacking += [
            name
            for name in KINDS[component.kind].required
            if name not in lacking and getattr(impl, name, None) is getattr(protocol, name, _MISSING)
        ]
        if lacking:
            raise PluginError(
                f"{mine} lacks {', '.join(lacking)}",
                where=component.impl,
                hint=f"{parent}, and define what has no default",
            )
        return impl

    def use(self, kind: Kind, given: Any, folder: Path | None = None) -> Use:
        """A component chosen as a recipe does: its name, or a mapping with its name under ``uses``.

        Args:
            kind: Its kind.
            given: The name or mapping.
            folder: What relative paths start from, for configs that read a file when they are validated.

        Raises:
            PluginError: there is none of this name, or two claim it.
            ValidationError: its config is wrong.
        """
        # Late, because pydantic is slow to import, and not every command reads a config.
        from pydantic_core import PydanticCustomError

        from luthier.api.config import Use

        raw: Any = {"uses": given} if isinstance(given, str) else given
        if not isinstance(raw, Mapping) or not isinstance(cast("Any", raw).get("uses"), str):
            raise PydanticCustomError("uses_missing", "expected a name, or a mapping with the key 'uses'")
        values = {str(key): item for key, item in cast("Mapping[Any, Any]", raw).items() if key != "uses"}
        component = self.get(kind, cast("Any", raw)["uses"])
        context = {"components": self, "folder": folder}
        return Use(component, self.config_class(component).model_validate(values, context=context))

    def build(self, use: Use, context: Any) -> Any:
        """An instance of a chosen component: its `impl`, made with its config and a context.

        Raises:
            PluginError: it cannot be imported or made, or lacks what its kind has; names whose component it is.
        """
        impl = self.impl_class(use.component)
        try:
            return impl(use.config, context)
        except LuthierError:
            raise
        # A plugin is foreign code: whatever it raises is reported under its name.
        except Exception as error:
            raise PluginError(
                f"the {use.component.kind} '{use.name}' of {self.provider(use.component)} cannot be made: "
                f"{type(error).__name__}: {error}",
                where=use.component.impl,
            ) from error

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

    def source_of(self, component: Component) -> Path | None:
        """The file with the component's implementation; nothing of it is imported. None where it is not known."""
        module = component.impl.partition(":")[0]
        package, _, name = module.rpartition(".")
        parent = sys.modules.get(package)
        for folder in getattr(parent, "__path__", ()):
            for path in (Path(folder) / f"{name}.py", Path(folder) / name / "__init__.py"):
                if path.exists():
                    return path
        try:
            spec = find_spec(module)
        # A plugin's package is imported by this, and may raise anything: the code that needs it gets the error.
        except Exception:  # noqa: BLE001
            return None
        return Path(spec.origin) if spec is not None and spec.origin is not None else None

    def collected(self, hook: str) -> Iterator[tuple[Any, str]]:
        """What every plugin provides in a hook that takes no arguments, and the plugin's name; one that fails is
        logged, or raises in strict mode."""
        for implementation in getattr(self.manager.hook, hook).get_hookimpls():
            try:
                yield implementation.function(), implementation.plugin_name
            except Exception:
                if self._strict:
                    raise
                logger.exception("the plugin %s failed in %s", implementation.plugin_name, hook)

    def tool_environments(self) -> dict[str, ToolEnvironment]:
        """The tools with their own environments, by name.

        Raises:
            PluginError: two plugins have one of the same name.
        """
        pairs = [
            (tool.name, tool, plugin)
            for tools, plugin in self.collected("luthier_tool_environments")
            for tool in cast("Iterable[ToolEnvironment]", tools)
        ]
        return _by_name("tool", pairs)

    def gguf_architectures(self) -> dict[str, str]:
        """The converters to GGUF, as ``module:Class`` by the architecture's name.

        Raises:
            PluginError: two plugins have one for the same architecture.
        """
        pairs = [
            (name, reference, plugin)
            for found, plugin in self.collected("luthier_gguf_architectures")
            for name, reference in cast("Mapping[str, str]", found).items()
        ]
        return _by_name("GGUF architecture", pairs)

    def commands(self) -> Iterator[click.Command]:
        """The command-line verbs of plugins."""
        for commands, _ in self.collected("luthier_commands"):
            yield from commands

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


_MISSING = object()


def members(protocol: type[Any]) -> set[str]:
    """The public members that a protocol declares, optional ones included."""
    declared = {name for base in protocol.__mro__ for name in (*vars(base), *vars(base).get("__annotations__", {}))}
    return {name for name in declared if not name.startswith("_")} - {"config", "context"}


def _near(word: str, known: Iterable[str]) -> str:
    names = sorted(known)
    found = difflib.get_close_matches(word, names, n=1)
    return f"did you mean '{found[0]}'?" if found else f"there are: {', '.join(names) or 'none'}"


def _by_name(what: str, found: Iterable[tuple[str, Any, str]]) -> dict[str, Any]:
    """Things by their names, of which two plugins must not have one.

    Raises:
        PluginError: two have.
    """
    result: dict[str, Any] = {}
    owners: dict[str, str] = {}
    for name, value, plugin in found:
        if name in result:
            raise PluginError(
                f"{owners[name]} and {plugin} both provide the {what} '{name}'", hint="uninstall one of them"
            )
        result[name], owners[name] = value, plugin
    return result


@cache
def default_registry() -> Registry:
    """The registry of this process."""
    return Registry.installed()
