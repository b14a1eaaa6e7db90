"""The stage that makes new rows."""

from luthier.api import Component, hookimpl


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="stage",
            name="augment",
            summary="Make new rows with an augmenter, and mix them with those there are",
            config="luthier_plugins.augment.config:AugmentConfig",
            impl="luthier_plugins.augment.stage:Augment",
            revision=4,
        )
    ]
