"""The conformance check: what every component of a kind has to do."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.api.component import Component
from luthier.api.config import Input, references
from luthier.api.descriptions import descriptions
from luthier.api.hooks import hookimpl
from luthier.api.kinds import KINDS, imported
from luthier.registry import Provider, Registry, default_registry
from luthier.registry.registry import members
from luthier.testing.stages import TestContext, tiny_dataset

HEAVY = ("torch", "transformers", "datasets", "trl", "peft")


@dataclass(frozen=True, slots=True)
class Finding:
    """One check and how it went; `problem` is None when it passed."""

    check: str
    problem: str | None


def check_component(
    component: Component, config: Mapping[str, Any] | None = None, *, registry: Registry | None = None
) -> None:
    """Check that a component is what it says it is.

    Its references resolve, its config can be described and read back, importing the config loads no heavy
    library, its `impl` has the methods of its kind, and on a small example it behaves.

    Args:
        component: The descriptor.
        config: Values for config fields without defaults.
        registry: Where sub-components are looked up; by default the installed plugins.

    Raises:
        AssertionError: names every check that failed.
    """
    problems = [
        f"{finding.check}: {finding.problem}"
        for finding in findings_of(component, config, registry=registry)
        if finding.problem
    ]
    if problems:
        raise AssertionError(f"the {component.kind} '{component.name}':\n" + "\n".join(problems))


def findings_of(
    component: Component, config: Mapping[str, Any] | None = None, *, registry: Registry | None = None
) -> list[Finding]:
    """Run every check that applies, one after the other; what builds on a failed one is left out."""
    registry = registry or default_registry()
    made: dict[str, Any] = {}
    found: list[Finding] = []
    for name, check in _checks(component, dict(config or {}), registry, made):
        try:
            check()
        # Foreign code is under test here: whatever it raises is the finding.
        except Exception as error:  # noqa: BLE001
            found.append(Finding(name, f"{type(error).__name__}: {error}"))
            break
        found.append(Finding(name, None))
    return found


def _checks(
    component: Component, values: dict[str, Any], registry: Registry, made: dict[str, Any]
) -> Iterator[tuple[str, Callable[[], None]]]:
    def describe() -> None:
        assert component.summary.strip(), "the summary is empty"
        assert "\n" not in component.summary, "the summary has more than one line"
        assert component.revision >= 1, "revisions count from 1"

    def config_class() -> None:
        made["class"] = _resolve(component.config)
        expected = KINDS[component.kind].config_base
        assert issubclass(made["class"], expected), f"{component.config} does not derive from {expected.__name__}"
        silent = sorted(set(made["class"].model_fields) - set(descriptions(made["class"])))
        assert not silent, f"these fields have no docstring: {', '.join(silent)}"

    def round_trip() -> None:
        made["class"].model_json_schema()
        context = {"components": registry}
        needed = sorted(name for name, field in made["class"].model_fields.items() if field.is_required())
        lacking = [name for name in needed if name not in values]
        assert not lacking, (
            f"'{lacking[0]}' has no default: give a value, with --set {lacking[0]}=VALUE on a command line"
        )
        made["config"] = made["class"].model_validate(values, context=context)
        again = made["class"].model_validate(made["config"].model_dump(mode="json"), context=context)
        assert again == made["config"], "the config read back from its own JSON is different"

    def light() -> None:
        _imports_nothing_heavy(component.config)
        if KINDS[component.kind].light:
            _imports_nothing_heavy(component.impl)

    def protocol() -> None:
        made["impl"] = registry.impl_class(component) if _is_registered(component, registry) else _checked(component)
        kind_class = KINDS[component.kind].protocol_class
        for name in members(kind_class):
            _same_parameters(kind_class, made["impl"], name)

    def behave() -> None:
        check = imported(KINDS[component.kind].example)
        with tempfile.TemporaryDirectory() as folder:
            # What its config names as data is a small dataset.
            named = {
                value: tiny_dataset(Path(folder))
                for _, marker, values in references(made["config"], Input)
                for value in values
                if "dataset" in marker.kinds
            }
            context = TestContext(artifacts=named, registry=registry)
            check(made["impl"](made["config"], context), made["config"])

    yield "the descriptor is complete", describe
    yield "the config class is documented", config_class
    yield "the config survives JSON", round_trip
    yield "importing the config is cheap", light
    yield "the implementation follows the protocol", protocol
    if KINDS[component.kind].example:
        yield "it behaves on a small example", behave


def _resolve(reference: str) -> Any:
    assert ":" in reference, f"'{reference}' is not written as 'module:Class'"
    return imported(reference)


def _imports_nothing_heavy(reference: str) -> None:
    module = reference.partition(":")[0]
    code = f"import sys, {module}; print(','.join(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.strip(), f"importing {module} loads {done.stdout.strip()}"


def _is_registered(component: Component, registry: Registry) -> bool:
    return any(component is other for other, _ in registry)


def _checked(component: Component) -> Any:
    """The implementation of a component that is not installed, checked like one that is."""
    registry = Registry()
    registry.add(_Offer(component), Provider("this", "this plugin", "?"))
    return registry.impl_class(component)


class _Offer:
    """A plugin with one component."""

    def __init__(self, component: Component) -> None:
        self._component = component

    @hookimpl
    def luthier_components(self) -> list[Component]:
        return [self._component]


def _same_parameters(kind_class: type[Any], impl: type[Any], name: str) -> None:
    wanted = getattr(kind_class, name, None)
    if not inspect.isfunction(wanted):
        return
    asked = list(inspect.signature(wanted).parameters)
    given = list(inspect.signature(getattr(impl, name)).parameters)
    assert given[: len(asked)] == asked, f"{name} takes ({', '.join(given)}), expected ({', '.join(asked)})"
