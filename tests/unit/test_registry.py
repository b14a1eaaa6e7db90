"""Plugins: conflicts, isolation, and names that no plugin provides."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest
from luthier.api import Component, PluginError, hookimpl
from luthier.registry import Provider, Registry


def offering(name: str) -> SimpleNamespace:
    """A plugin that hands over one merge method."""
    component = Component(kind="merge_method", name=name, summary="x", config="no.such:Config", impl="no.such:Impl")
    return SimpleNamespace(luthier_components=hookimpl(lambda: [component]))


def test_two_providers_of_one_name_are_both_named() -> None:
    registry = Registry()
    registry.add(offering("twice"), Provider("a", "plugin-a", "1"))
    registry.add(offering("twice"), Provider("b", "plugin-b", "2"))
    with pytest.raises(PluginError, match=r"plugin-a 1 and plugin-b 2 both provide the merge_method 'twice'"):
        registry.get("merge_method", "twice")


def test_a_broken_plugin_is_isolated_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry()
    registry.load(EntryPoint("bad", "no.such.module", "luthier"))
    registry.add(offering("fine"), Provider("a", "plugin-a", "1"))
    assert registry.get("merge_method", "fine").name == "fine"
    assert "ModuleNotFoundError" in registry.broken[0].error
    with pytest.raises(PluginError, match="luthier plugins"):
        registry.get("merge_method", "gone")
    monkeypatch.setenv("LUTHIER_STRICT_PLUGINS", "1")
    with pytest.raises(PluginError, match="cannot be loaded"):
        Registry().load(EntryPoint("bad", "no.such.module", "luthier"))


def test_an_unknown_hook_is_an_error() -> None:
    plugin = SimpleNamespace(luthier_compoments=hookimpl(lambda: []))
    with pytest.raises(Exception, match="luthier_compoments"):
        Registry().add(plugin, Provider("a", "plugin-a", "1"))


def test_an_observer_that_fails_does_not_end_a_run() -> None:
    seen: list[str] = []

    def fails(stage: str) -> None:
        seen.append(stage)
        raise RuntimeError("no")

    registry = Registry()
    registry.add(SimpleNamespace(luthier_stage_started=hookimpl(fails)), Provider("a", "plugin-a", "1"))
    registry.notify("luthier_stage_started", stage="x", key="k")
    assert seen == ["x"]


def test_a_config_that_cannot_be_imported_names_its_provider() -> None:
    registry = Registry()
    registry.add(offering("lost"), Provider("a", "plugin-a", "1"))
    with pytest.raises(PluginError, match=r"plugin-a 1 cannot be loaded: ModuleNotFoundError"):
        registry.config_class(registry.get("merge_method", "lost"))
