"""Supervised fine-tuning."""

from __future__ import annotations

from luthier.api import Facts, Stage
from luthier.training.tuning import tune
from luthier_plugins.sft.config import SftConfig


class Sft(Stage[SftConfig]):
    """The stage ``sft``."""

    def run(self) -> Facts:
        return tune(self.config, self.context)
