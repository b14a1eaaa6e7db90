"""The stage that takes a model from outside."""

from luthier.api import Component, hookimpl


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="stage",
            name="base",
            summary="Take a model from a folder or the hub, checked before anything is trained",
            config="luthier_plugins.base.config:BaseConfig",
            impl="luthier_plugins.base.stage:Base",
        )
    ]
