"""Direct preference optimization."""

from __future__ import annotations

from luthier.api import Facts, Stage
from luthier.training.tuning import tune
from luthier_plugins.dpo.config import DpoConfig


class Dpo(Stage[DpoConfig]):
    """The stage ``dpo``."""

    def run(self) -> Facts:
        return tune(self.config, self.context)
