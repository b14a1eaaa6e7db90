"""Losses on preference pairs: one small file each."""

from luthier.api import Component, hookimpl


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="preference_loss",
            name="orpo",
            summary="The ORPO loss: fine-tuning on the chosen answer, and the odds ratio",
            config="luthier_plugins.preference_losses.config:OrpoLossConfig",
            impl="luthier_plugins.preference_losses.orpo:Orpo",
        ),
        Component(
            kind="preference_loss",
            name="sigmoid",
            summary="The DPO loss",
            config="luthier_plugins.preference_losses.config:SigmoidConfig",
            impl="luthier_plugins.preference_losses.sigmoid:Sigmoid",
        ),
    ]
