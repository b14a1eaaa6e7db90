"""The stage for supervised fine-tuning."""

from luthier.api import Component, hookimpl


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="stage",
            name="sft",
            summary="Supervised fine-tuning on conversations, full or with an adapter",
            config="luthier_plugins.sft.config:SftConfig",
            impl="luthier_plugins.sft.stage:Sft",
            revision=3,
        )
    ]
