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
        Component(
            kind="optimizer",
            name="adamw8bit",
            summary="AdamW with moments in 8 bits: a quarter of their memory",
            config="luthier_plugins.optimizers.config:AdamwConfig",
            impl="luthier_plugins.optimizers.adamw:Adamw8bit",
        ),
        Component(
            kind="optimizer",
            name="adafactor",
            summary="Adafactor: second moments by rows and columns",
            config="luthier_plugins.optimizers.config:AdafactorConfig",
            impl="luthier_plugins.optimizers.adafactor:Adafactor",
        ),
        Component(
            kind="optimizer",
            name="lion",
            summary="Lion: the sign of the momentum",
            config="luthier_plugins.optimizers.config:LionConfig",
            impl="luthier_plugins.optimizers.lion:Lion",
        ),
        Component(
            kind="optimizer",
            name="muon",
            summary="Muon for hidden matrices, AdamW for the rest",
            config="luthier_plugins.optimizers.config:MuonConfig",
            impl="luthier_plugins.optimizers.muon:Muon",
        ),
    ]
