"""The stage that reads data files."""

from luthier.api import Component, hookimpl


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="stage",
            name="data",
            summary="Read, check and split data files",
            config="luthier_plugins.data.config:DataConfig",
            impl="luthier_plugins.data.stage:Data",
            revision=4,
        )
    ]
