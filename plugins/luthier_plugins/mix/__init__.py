"""The stage that joins datasets."""

from luthier.api import Component, hookimpl


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="stage",
            name="mix",
            summary="Join datasets: all of them, or shares of rows or tokens",
            config="luthier_plugins.mix.config:MixConfig",
            impl="luthier_plugins.mix.stage:Mix",
        )
    ]
