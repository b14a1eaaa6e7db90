"""The stage ``merge``."""

from __future__ import annotations

from luthier.api import Facts, StageContext
from luthier.merging.config import MergeConfig
from luthier.merging.verify import Verifier


class MergeStage:
    """The stage ``merge``."""

    def __init__(self, config: MergeConfig) -> None:
        self.config = config

    def run(self, context: StageContext) -> Facts:
        # The other process imports transformers meanwhile; it is started before torch is imported here.
        with Verifier(context.out) as verifier:
            from luthier.merging.merge import merge_into

            return merge_into(self.config, context, verifier)
