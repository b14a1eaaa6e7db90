"""The stage that makes a new model."""

from luthier.api import Component, hookimpl


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="stage",
            name="init",
            summary="Train a byte-level BPE tokenizer and make a Llama model with random weights",
            config="luthier_plugins.init.config:InitConfig",
            impl="luthier_plugins.init.stage:Init",
        )
    ]
