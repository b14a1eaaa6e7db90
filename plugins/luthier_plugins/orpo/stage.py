"""Odds-ratio preference optimization."""

from __future__ import annotations

from luthier.api import Facts, Stage
from luthier.training.tuning import tune
from luthier_plugins.orpo.config import OrpoConfig


class Orpo(Stage[OrpoConfig]):
    """The stage ``orpo``."""

    def run(self) -> Facts:
        return tune(self.config, self.context)
