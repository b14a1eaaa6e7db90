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
            summary="LoRA on a base model in 4 or 8 bits",
            config="luthier_plugins.adapters.config:QloraConfig",
            impl="luthier_plugins.adapters.lora:Qlora",
        ),
        Component(
            kind="adapter",
            name="vera",
            summary="VeRA: trained scales of shared random matrices",
            config="luthier_plugins.adapters.config:VeraConfig",
            impl="luthier_plugins.adapters.others:Vera",
        ),
        Component(
            kind="adapter",
            name="ia3",
            summary="IA3: trained scales of activations",
            config="luthier_plugins.adapters.config:Ia3Config",
            impl="luthier_plugins.adapters.others:Ia3",
        ),
        Component(
            kind="adapter",
            name="oft",
            summary="OFT: orthogonal rotations of weights",
            config="luthier_plugins.adapters.config:OftConfig",
            impl="luthier_plugins.adapters.others:Oft",
        ),
        Component(
            kind="adapter",
            name="peft",
            summary="Any tuner of PEFT, by its type and options",
            config="luthier_plugins.adapters.config:PeftTunerConfig",
            impl="luthier_plugins.adapters.others:PeftTuner",
        ),
    ]
