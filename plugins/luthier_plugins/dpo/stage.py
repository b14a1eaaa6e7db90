"""Direct preference optimization."""

from __future__ import annotations

from luthier.api import Facts, StageContext
from luthier.training.preference import tune_on_pairs
from luthier_plugins.dpo.config import DpoConfig


class Dpo:
    """The stage ``dpo``."""

    def __init__(self, config: DpoConfig) -> None:
        self.config = config

    def run(self, context: StageContext) -> Facts:
        return tune_on_pairs(context.component(self.config.loss), self.config.beta, self.config, context)
