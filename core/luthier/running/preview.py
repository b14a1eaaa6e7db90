"""Has a stage say what it would train on: what it needs for that is made, and nothing is trained."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from luthier.api.errors import LuthierError, Problem, RecipeError, StageError
from luthier.api.tuning import TrainingConfig
from luthier.planning import Node, Plan
from luthier.recipe.problems import near
from luthier.running.events import Listener
from luthier.running.jobs import job_of
from luthier.running.runner import run
from luthier.running.slots import worker_launch


@dataclass(frozen=True, slots=True)
class Preview:
    """What was found.

    Attributes:
        facts: See `luthier.training.preview.looked_at`.
        warnings: What training would warn of.
        instead: For each model that is not made yet, whose tokenizer and template stand for its.
    """

    facts: dict[str, Any]
    warnings: list[str]
    instead: dict[str, str]


def preview(plan: Plan, stage: str, rows: int, listeners: Sequence[Listener] = ()) -> Preview:
    """What a stage would train on.

    Datasets that it needs are made. A model that is not there yet is not: tokens are those of the model that it will be
    made from.

    Args:
        plan: The plan.
        stage: The stage.
        rows: How many rows are shown.
        listeners: Hear what happens meanwhile.

    Raises:
        RecipeError: there is no such stage, or it trains on no rows.
        LuthierError: the error with which training would end.
    """
    if stage not in plan.nodes:
        raise RecipeError([Problem(f"there is no stage '{stage}'", hint=near(stage, plan.nodes))])
    node = plan.nodes[stage]
    if not isinstance(node.config, TrainingConfig):
        raise RecipeError(
            f"'{stage}' ({node.component.name}) trains on no rows", hint="name a stage such as sft, dpo or pretrain"
        )
    named = {name for names in node.inputs.values() for name in names}
    standing = {name: _standing_for(plan, name) for name in named}
    needed = sorted({name for name in standing.values() if plan.artifact_of(name) is None})
    if needed:
        result = run(plan, only=needed, listeners=listeners)
        failed = next((item for item in result.stages.values() if item.error is not None), None)
        if failed is not None and failed.error is not None:
            raise failed.error
    artifacts: dict[str, Any] = {name: plan.artifact_of(stand) for name, stand in standing.items()}
    artifacts |= {name: found for name in node.tests.values() if (found := plan.artifact_of(name)) is not None}
    lacking = [name for name in named if artifacts[name] is None]
    if lacking:
        raise StageError(f"'{lacking[0]}' was not made", hint="run again")
    with tempfile.TemporaryDirectory() as folder:
        # Of its own: another process may be making the stage right now.
        alone = {"out": f"{folder}/out", "scratch": folder}
        job = replace(job_of(plan, node, "preview", artifacts), preview=rows, ranks=1, step=None, **alone)
        facts, warnings = _asked(job.to_json(), listeners)
    return Preview(facts, warnings, {name: stand for name, stand in standing.items() if stand != name})


def _standing_for(plan: Plan, name: str) -> str:
    """The input itself where it is there or is no model, else the model that it will be made from."""
    while name in plan.nodes and plan.artifact_of(name) is None:
        models = _models_of(plan, plan.nodes[name])
        if not models:
            break
        name = models[0]
    return name


def _models_of(plan: Plan, node: Node) -> list[str]:
    """The models that a model is made from: the first has its tokenizer."""
    if node.produces not in ("model", "adapter"):
        return []
    names = [name for names in node.inputs.values() for name in names]
    return [name for name in names if name in plan.outside or plan.nodes[name].produces in ("model", "adapter")]


def _asked(job: dict[str, Any], listeners: Sequence[Listener]) -> tuple[dict[str, Any], list[str]]:
    """What a worker says of the job."""
    launch = worker_launch()
    # A file, because a library that writes much would block on a pipe without a reader.
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as log,
        subprocess.Popen(
            launch.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=dict(launch.environment),
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        for line in process.stdout:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == "result":
                process.kill()
                return event["facts"], event["warnings"]
            if event["event"] == "failed":
                process.kill()
                raise LuthierError(event["message"], where=event["where"], hint=event["hint"])
            for listener in listeners:
                listener(event)
        log.seek(0)
        last = log.read().strip().rpartition("\n")[2]
    raise StageError(f"the worker ended: {last}")
