"""Plugins that a test writes itself: in its own process, or where workers find them too."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
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


HEAD = """\
from luthier.api import *
from luthier.api import Component, hookimpl


@hookimpl
def luthier_components():
    return [Component(kind={kind!r}, name={name!r}, summary="A test's own", config="{module}:C", impl="{module}:I")]


"""


def put_on_path(folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str, code: str) -> None:
    """A distribution with one component that this process's children find, without installing it.

    Args:
        folder: Where to write it.
        monkeypatch: Puts the folder on the path of children.
        kind: The component's kind.
        name: Its name.
        code: The classes ``C``, its config, and ``I``, its implementation.
    """
    module = f"plugin_{name.replace('-', '_')}"
    place = folder / "plugins"
    info = place / f"{module}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[luthier]\n{name} = {module}\n")
    (place / f"{module}.py").write_text(HEAD.format(kind=kind, name=name, module=module) + code)
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", f"{place}{os.pathsep}{before}" if before else str(place))
