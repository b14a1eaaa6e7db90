"""The stage that stores a model's weights with fewer bits."""

from luthier.api import Component, hookimpl


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="stage",
            name="quantize",
            summary="Store a model's weights with fewer bits, and compare it with what it was",
            config="luthier_plugins.quantize.config:QuantizeConfig",
            impl="luthier_plugins.quantize.stage:Quantize",
        )
    ]
