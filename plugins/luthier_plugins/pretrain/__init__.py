"""The stage for pre-training."""

from luthier.api import Component, hookimpl


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="stage",
            name="pretrain",
            summary="(Continual) pre-training on texts and conversations, packed into blocks",
            config="luthier_plugins.pretrain.config:PretrainConfig",
            impl="luthier_plugins.pretrain.stage:Pretrain",
            revision=3,
        )
    ]
