"""Tuning on good and bad answers."""

from __future__ import annotations

from luthier.api import Facts, Stage
from luthier.training.tuning import tune
from luthier_plugins.kto.config import KtoConfig


class Kto(Stage[KtoConfig]):
    """The stage ``kto``."""

    def run(self) -> Facts:
        return tune(self.config, self.context)
