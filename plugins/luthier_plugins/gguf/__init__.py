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
        )
    ]
