"""The stage for odds-ratio preference optimization."""

from luthier.api import Component, hookimpl


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="stage",
            name="orpo",
            summary="Learn the chosen answers and push the rejected ones away at once, without a reference",
            config="luthier_plugins.orpo.config:OrpoConfig",
            impl="luthier_plugins.orpo.stage:Orpo",
            revision=3,
        )
    ]
