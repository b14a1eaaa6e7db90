"""Weights with fewer bits, in the layouts that vLLM, TGI, SGLang and transformers load."""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier.api import Component, hookimpl

if TYPE_CHECKING:
    from luthier.api import ToolEnvironment

METHODS = {
    "awq": ("4 bits in AutoAWQ's layout, for vLLM and TGI", "AwqConfig", "grouped:Awq"),
    "gptq": ("4 or 8 bits in GPTQ's layout, for vLLM and TGI", "GptqConfig", "grouped:Gptq"),
    "int8": ("8-bit integers for weights and activations (W8A8), compressed-tensors", "Int8Config", "channels:Int8"),
    "fp8": ("8-bit floats for weights and activations, compressed-tensors", "Fp8Config", "channels:Fp8"),
    "torchao": ("8 bits in torchao's layout, for transformers and vLLM", "TorchaoConfig", "torchao:Torchao"),
    "nf4": ("4-bit NormalFloat of bitsandbytes", "Nf4Config", "nf4:Nf4"),
}


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="quantizer",
            name=name,
            summary=summary,
            config=f"luthier_plugins.quantizers.config:{config}",
            impl=f"luthier_plugins.quantizers.{impl}",
        )
        for name, (summary, config, impl) in METHODS.items()
    ]


@hookimpl
def luthier_tool_environments() -> list[ToolEnvironment]:
    # Late: only who asks for tools pays for their module.
    from luthier_plugins.quantizers.tools import AUTO_ROUND, TORCHAO

    return [AUTO_ROUND, TORCHAO]
