"""The stage that makes files for the program that will serve the model."""

from luthier.api import Component, hookimpl


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="stage",
            name="export",
            summary="Write a model as files for the program that will serve it, and check them there",
            config="luthier_plugins.export.config:ExportConfig",
            impl="luthier_plugins.export.stage:Export",
        )
    ]
