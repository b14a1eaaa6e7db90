"""The stage that merges models."""

from luthier.api import Component, hookimpl


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="stage",
            name="merge",
            summary="Merge models of one architecture, in a stream",
            config="luthier_plugins.merge.config:MergeConfig",
            impl="luthier_plugins.merge.stage:MergeStage",
            revision=2,
        )
    ]
