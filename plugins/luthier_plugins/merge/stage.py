"""The stage ``merge``."""

from __future__ import annotations

from luthier.api import Facts, Stage
from luthier.merging.config import MergeConfig
from luthier.merging.verify import Verifier


class MergeStage(Stage[MergeConfig]):
    """The stage ``merge``."""

    def run(self) -> Facts:
        # The other process imports transformers meanwhile; it is started before torch is imported here.
        with Verifier(self.context.out) as verifier:
            from luthier.merging.merge import merge_into

            return merge_into(self.config, self.context, verifier)
