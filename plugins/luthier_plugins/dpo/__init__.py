"""The stage for direct preference optimization."""

from luthier.api import Component, hookimpl


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="stage",
            name="dpo",
            summary="Preference optimization against the model it was given, adapter included",
            config="luthier_plugins.dpo.config:DpoConfig",
            impl="luthier_plugins.dpo.stage:Dpo",
            revision=3,
        )
    ]
