"""Luthier: from a base model and your data to a tuned, merged, quantized and proven model.

The Python API is what the command line uses::

    from luthier import Recipe, plan, run

    recipe = Recipe.load("recipes/quickstart.yaml")
    print(plan(recipe))
    result = run(recipe)
    print(result.artifact("merged").path)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.planning import Plan, plan
    from luthier.recipe import Recipe
    from luthier.running.runner import RunResult, run

__version__ = "0.1.0"
__all__ = ["Plan", "Recipe", "RunResult", "__version__", "plan", "run"]

_HOME = {
    "Plan": "luthier.planning",
    "Recipe": "luthier.recipe",
    "RunResult": "luthier.running.runner",
    "plan": "luthier.planning",
    "run": "luthier.running.runner",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `luthier --help` does not pay for pydantic and yaml.
    if name not in _HOME:
        raise AttributeError(f"module 'luthier' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
