"""How weights follow their gradients."""

from luthier.api import Component, hookimpl


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="optimizer",
            name="adamw",
            summary="AdamW in float32",
            config="luthier_plugins.optimizers.config:AdamwConfig",
            impl="luthier_plugins.optimizers.adamw:Adamw",
        ),
    ]
