"""The objective ``cross_entropy``."""

from __future__ import annotations

from typing import ClassVar

from luthier.api import CompletionBatch, LossResult, Objective, Unit
from luthier_plugins.objectives.config import CrossEntropyConfig


class CrossEntropy(Objective[CrossEntropyConfig]):
    """-log p of each trained token."""

    unit: ClassVar[Unit] = "token"

    def loss(self, batch: CompletionBatch) -> LossResult:
        return LossResult(-batch.logps)
