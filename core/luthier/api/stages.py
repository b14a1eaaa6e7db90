"""The protocol of stages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from luthier.api.component import C, Implementation

if TYPE_CHECKING:
    from luthier.api.context import StageContext

Facts = dict[str, Any]
"""What a manifest states about an artifact: plain values, as JSON has them."""


class Stage(Implementation[C]):
    """Kind ``stage``: one step of a recipe."""

    context: StageContext

    def run(self) -> Facts:
        """Write the artifact into ``self.context.out`` and return the facts for its manifest.

        Facts are plain values (as JSON has them), and state at least what `luthier.api.artifact.REQUIRED_FACTS` lists
        for the kind of artifact; `luthier.artifacts` makes those of datasets and models.
        """
        raise NotImplementedError
