"""LoRA and its relatives, through PEFT."""

from luthier.api import Component, hookimpl


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="adapter",
            name="lora",
            summary="Low-rank adaptation",
            config="luthier_plugins.adapters.config:LoraConfig",
            impl="luthier_plugins.adapters.lora:Lora",
        ),
        Component(
            kind="adapter",
            name="dora",
            summary="LoRA with the weights' magnitudes trained apart",
            config="luthier_plugins.adapters.config:LoraConfig",
            impl="luthier_plugins.adapters.lora:Dora",
        ),
        Component(
            kind="adapter",
            name="qlora",
            summary="LoRA on a base model in 4 bits (NF4)",
            config="luthier_plugins.adapters.config:QloraConfig",
            impl="luthier_plugins.adapters.lora:Qlora",
        ),
    ]
