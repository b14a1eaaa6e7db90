"""Runs a plan: store, locks, manifests, runner, worker, events."""

from luthier.running.runner import RunResult, StageResult, run

__all__ = ["RunResult", "StageResult", "run"]
