"""Runs one job in this process, and reports how it ended."""

from __future__ import annotations

import errno
import json
import math
import random
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any, cast

from luthier.api.artifact import REQUIRED_FACTS, ArtifactKind
from luthier.api.config import StageConfig
from luthier.api.errors import Interrupted, LuthierError, StageError, StoreError
from luthier.api.execution import Outcome
from luthier.registry import Registry
from luthier.worker.context import JobContext, Listener
from luthier.worker.job import Job
from luthier.worker.leaking import check_leakage
from luthier.worker.tracking import Trackers

LITTLE = 1 << 20
"""Bytes left on a disk that counts as full."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def execute(job: Job, registry: Registry, listener: Listener, *, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Run a job.

    Returns:
        The event that says how it ended: ``result``, ``failed`` or ``interrupted``.
    """
    started = time.perf_counter()
    try:
        context = JobContext(job, registry, listener, rank=rank, world=world)
        if not rank:
            shutil.rmtree(context.out, ignore_errors=True)
            context.out.mkdir(parents=True)
        use = registry.use("stage", {"uses": job.component, **job.config})
        config = cast("StageConfig", use.config)
        if not rank:
            check_leakage(config, job.tests, registry, context)
        stage = registry.build(use, context)
        seed_everything(job.seed)
        loaded = time.perf_counter()
        facts = _tracked(stage, job, config, registry, context)
    except Interrupted as error:
        return {"event": "interrupted", "stage": job.stage, "message": error.message}
    # Stages are plugins: whatever they raise is this stage's failure, not the worker's.
    except Exception as error:  # noqa: BLE001
        return failure(error, job, rank)
    ended = time.perf_counter()
    seconds = {"load": loaded - started, "run": ended - loaded}
    return {"event": "result", "stage": job.stage, "facts": facts, "warnings": context.warnings, "seconds": seconds}


def _tracked(stage: Any, job: Job, config: StageConfig, registry: Registry, context: JobContext) -> dict[str, Any]:
    """Run a stage with its trackers, which get the outcome."""
    if context.rank or job.preview:
        return stage.run()
    trackers = context.trackers = Trackers(job, registry, context)
    outcome: Outcome = "failed"
    facts: dict[str, Any] = {}
    try:
        made = stage.run()
        component = registry.get("stage", job.component)
        check_facts(made, config.produces(job.kinds), str(registry.provider(component)))
        outcome, facts = "done", made
    except Interrupted:
        outcome = "interrupted"
        raise
    finally:
        trackers.finish(outcome, facts)
    return facts


def failure(error: Exception, job: Job, rank: int = 0) -> dict[str, Any]:
    """The event that reports an error."""
    known = error if isinstance(error, LuthierError) else _disk_full(error, job)
    message = known.message if known else f"{type(error).__name__}: {error}"
    return {
        "event": "failed",
        "stage": job.stage,
        "known": known is not None,
        "type": type(error).__name__,
        "message": f"rank {rank}: {message}" if rank else message,
        "where": known.where if known else None,
        "hint": known.hint if known else None,
        "traceback": traceback.format_exc(),
    }


def check_facts(facts: Any, kind: ArtifactKind, provider: str) -> None:
    """Refuse facts that a manifest cannot hold, or that lack what every artifact of the kind states.

    Raises:
        StageError: names what is missing, and whose stage it was; or the number that is NaN or infinite.
    """
    problem = ""
    odd = next(_not_finite(facts), None)
    if odd is not None:
        raise StageError(f"the result is not finite: {odd[0]} is {odd[1]}", hint="nothing is stored of it")
    if not isinstance(facts, dict):
        problem = f"it returned {type(facts).__name__} instead of its facts"
    else:
        missing = [name for name in REQUIRED_FACTS[kind] if name not in facts]
        try:
            json.dumps(facts, allow_nan=False)
        except (TypeError, ValueError) as error:
            problem = f"its facts are not plain values: {error}"
        if missing:
            problem = f"its facts lack {', '.join(missing)}, which every {kind} states"
    if problem:
        raise StageError(f"the stage of {provider} is at fault: {problem}", hint="report this to its author")


def _not_finite(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """The numbers among plain values that JSON has no word for, and where they are."""
    if isinstance(value, float) and not math.isfinite(value):
        yield path, value
    elif isinstance(value, dict):
        for key, item in cast("dict[Any, Any]", value).items():
            yield from _not_finite(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for place, item in enumerate(cast("list[Any]", value)):
            yield from _not_finite(item, f"{path}[{place}]")


def seed_everything(seed: int) -> None:
    """Seed every source of random numbers that is loaded, so that no stage depends on those that ran before it."""
    random.seed(seed)
    loaded: dict[str, Any] = dict(sys.modules)
    if "numpy" in loaded:
        loaded["numpy"].random.seed(seed % 2**32)
    if "torch" in loaded:
        loaded["torch"].manual_seed(seed)


def _disk_full(error: Exception, job: Job) -> StoreError | None:
    """The error to show when `error` says that nothing more can be written; None for all others.

    Libraries in Rust and C++ raise their own errors with the system's number in the text.
    """
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    numbers = [item.errno for item in chain if isinstance(item, OSError)]
    named = any(f"os error {code}" in str(item) for item in chain for code in FULL)
    # torch's own writer says no more than that it could not write.
    silent = any("inline_container" in str(item) for item in chain) and shutil.disk_usage(job.scratch).free < LITTLE
    if not named and not silent and not any(number in FULL for number in numbers):
        return None
    return StoreError(
        f"the disk is full: {error}",
        where=job.scratch,
        hint="free some space (`luthier clean`) or choose another store with --store, then run again: "
        "what was finished is kept",
    )
