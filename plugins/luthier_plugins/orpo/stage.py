"""Odds-ratio preference optimization."""

from __future__ import annotations

from luthier.api import Facts, StageContext
from luthier.training.preference import tune_on_pairs
from luthier_plugins.orpo.config import OrpoConfig


class Orpo:
    """The stage ``orpo``."""

    def __init__(self, config: OrpoConfig) -> None:
        self.config = config

    def run(self, context: StageContext) -> Facts:
        return tune_on_pairs(context.make("preference_loss", "orpo"), self.config.beta, self.config, context)
