"""What a worker is told of a stage."""

from __future__ import annotations

from collections.abc import Mapping

from luthier.api.artifact import Artifact
from luthier.api.config import dump_use
from luthier.api.errors import StoreError
from luthier.artifacts.checkpoints import last_step
from luthier.planning import Node, Plan
from luthier.worker.job import Job


def job_of(plan: Plan, node: Node, run: str, artifacts: Mapping[str, Artifact]) -> Job:
    """The job that makes a stage's artifact.

    Args:
        plan: The plan.
        node: The stage.
        run: The run's id.
        artifacts: What its inputs, and the datasets that its recipe tests on, are in the store, by their names.

    Raises:
        StoreError: its scratch folder cannot be made.
    """
    work = plan.store.work(node.key)
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"the scratch folder cannot be made: {error.strerror}",
            where=str(work),
            hint="is the store read-only or the disk full? choose another one with --store",
        ) from error
    recipe = plan.recipe
    return Job(
        stage=node.id,
        component=node.component.name,
        config=node.config.model_dump(mode="json"),
        artifacts={value: str(artifacts[name].path) for value, name in node.names.items()},
        kinds={path: [artifacts[name].kind for name in names] for path, names in node.inputs.items()},
        sources=node.source_places,
        seed=node.config.seed if node.config.seed is not None else recipe.seed,
        key=node.key,
        out=str(work / "out"),
        scratch=str(work),
        run=run,
        recipe=recipe.name,
        tracking=str(plan.store.tracking(recipe.name, node.id, node.key)),
        store=str(plan.store.root),
        trackers=[dump_use(use) for use in recipe.trackers],
        step=last_step(work),
        ranks=node.config.ranks,
        date=None if recipe.date is None else recipe.date.isoformat(),
        tests={stage: str(artifacts[name].path) for stage, name in node.tests.items() if name in artifacts},
    )
