"""What keys are made of, written down: ``python tests/snapshots.py`` rewrites both files.

- ``component_defaults.json``: the defaults of every built-in component and its revision. Keys leave defaults out, so a
  changed default has to raise the revision: else artifacts that were made with the old one count as made with the new.
- ``quickstart_keys.json``: the keys of the quickstart. When they change, every user's cache is thrown away once.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from luthier.api.config import NotIdentity, marker
from luthier.planning import plan
from luthier.registry import default_registry
from pydantic_core import to_jsonable_python

HERE = Path(__file__).parent / "unit"
DEFAULTS, KEYS = HERE / "component_defaults.json", HERE / "quickstart_keys.json"
QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"


def component_defaults() -> dict[str, Any]:
    """Revision and defaults of every component that comes with Luthier; what is not identity is left out."""
    registry = default_registry()
    found: dict[str, Any] = {}
    for component, provider in registry:
        if provider.distribution != "luthier":
            continue
        config = registry.config_class(component)
        defaults = {
            name: to_jsonable_python(field.get_default(call_default_factory=True))
            for name, field in config.model_fields.items()
            if not field.is_required() and marker(config, name, NotIdentity) is None
        }
        found[f"{component.kind} {component.name}"] = {"revision": component.revision, "defaults": defaults}
    return dict(sorted(found.items()))


def quickstart_keys() -> dict[str, str]:
    """The key of every stage of the quickstart."""
    with tempfile.TemporaryDirectory() as store:
        return {name: node.key for name, node in plan(QUICKSTART, store).nodes.items()}


if __name__ == "__main__":
    for path, content in ((DEFAULTS, component_defaults()), (KEYS, quickstart_keys())):
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
