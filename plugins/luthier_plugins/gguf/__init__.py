"""Export to GGUF, the format of llama.cpp."""

from luthier.api import Component, hookimpl


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="exporter",
            name="gguf",
            summary="GGUF files for llama.cpp, quantized with its kernels and checked in it",
            config="luthier_plugins.gguf.config:GgufConfig",
            impl="luthier_plugins.gguf.exporter:Gguf",
            revision=2,
        ),
        Component(
            kind="generator",
            name="llama",
            summary="A GGUF file in llama.cpp",
            config="luthier_plugins.gguf.config:LlamaConfig",
            impl="luthier_plugins.gguf.generator:Llama",
        ),
    ]


@hookimpl
def luthier_gguf_architectures() -> dict[str, str]:
    # Late: only who exports pays for their module.
    from luthier_plugins.gguf.architectures import ARCHITECTURES

    return ARCHITECTURES
