"""Export to a folder that clients of the Hugging Face world load."""

from luthier.api import Component, hookimpl


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="exporter",
            name="hf",
            summary="A folder that transformers 4 and 5, vLLM, TGI and SGLang load alike",
            config="luthier_plugins.hf.config:HfConfig",
            impl="luthier_plugins.hf.exporter:Hf",
            revision=2,
        )
    ]
