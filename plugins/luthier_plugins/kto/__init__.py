"""The stage for tuning on good and bad answers."""

from luthier.api import Component, hookimpl


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="stage",
            name="kto",
            summary="Tuning on good and bad answers that are no pairs, against the model it was given",
            config="luthier_plugins.kto.config:KtoConfig",
            impl="luthier_plugins.kto.stage:Kto",
        )
    ]
