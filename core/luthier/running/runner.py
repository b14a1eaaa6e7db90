"""Runs a recipe: what the command line and the Python API call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from luthier.api.errors import Problem, RecipeError
from luthier.artifacts.store import Store
from luthier.planning import Plan, plan
from luthier.recipe import Recipe
from luthier.recipe.problems import near
from luthier.running.events import Listener
from luthier.running.results import RunResult, StageResult
from luthier.running.scheduler import Scheduler
from luthier.serving.environments import missing

__all__ = ["RunResult", "StageResult", "run"]


def run(
    recipe: Recipe | Plan | str | Path,
    *,
    store: Store | str | Path | None = None,
    only: str | Sequence[str] = (),
    keep_going: bool = False,
    listeners: Sequence[Listener] = (),
) -> RunResult:
    """Run a recipe: what is cached is not run again, what was interrupted resumes.

    Args:
        recipe: A recipe, its path, or a plan made from it.
        store: Where artifacts are kept; see `Store.at`.
        only: The stage or stages to make, with what they need; by default all.
        keep_going: After a failure, still run the stages that do not depend on it.
        listeners: Called with every event.

    Raises:
        PluginError: a tool with its own environment is not installed.
        RecipeError: the recipe is wrong, or `only` names a stage that is not in it. A failed stage does not raise: see
            `RunResult`.
    """
    the_plan = recipe if isinstance(recipe, Plan) else plan(recipe, store)
    wanted = [only] if isinstance(only, str) else list(only)
    problems = [
        Problem(f"there is no stage '{name}'", hint=near(name, the_plan.nodes))
        for name in wanted
        if name not in the_plan.nodes
    ]
    if problems:
        raise RecipeError(problems)
    # Before the first stage, not after hours of training.
    for tool in the_plan.missing_tools(wanted):
        raise missing(tool)
    return Scheduler(the_plan, keep_going, list(listeners)).run(wanted)
