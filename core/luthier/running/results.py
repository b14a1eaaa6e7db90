"""How a run and its stages ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from luthier.api.artifact import Artifact
from luthier.api.config import Gate
from luthier.api.errors import LuthierError, StageError
from luthier.planning import Node, Plan

StageOutcome = Literal["cached", "done", "failed", "skipped", "interrupted"]


@dataclass(slots=True)
class StageResult:
    """How one stage of a run ended."""

    node: Node
    outcome: StageOutcome
    seconds: float = 0.0
    artifact: Artifact | None = None
    error: LuthierError | None = None
    gates: list[Gate] = field(default_factory=list[Gate])


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended."""

    id: str
    plan: Plan
    stages: dict[str, StageResult]
    stopped: bool = False

    @property
    def exit_code(self) -> int:
        """0 done, 1 a stage failed, 3 a gate did not hold, 130 interrupted."""
        outcomes = [stage.outcome for stage in self.stages.values()]
        # A stage that was quicker than the signal is done; those after it are not.
        if "interrupted" in outcomes or (self.stopped and "skipped" in outcomes):
            return 130
        if "failed" in outcomes:
            return 1
        return 3 if any(not gate.ok for stage in self.stages.values() for gate in stage.gates) else 0

    def artifact(self, stage: str) -> Artifact:
        """The artifact of a stage.

        Raises:
            StageError: the stage has none, because it failed or was not reached.
        """
        result = self.stages.get(stage)
        if result is None or result.artifact is None:
            why = result.outcome if result else "it was not asked for" if stage in self.plan.nodes else "there is none"
            raise StageError(f"the stage '{stage}' made no artifact in this run ({why})")
        return result.artifact
