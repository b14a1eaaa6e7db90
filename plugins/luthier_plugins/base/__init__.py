"""The stages that take models and adapters from outside."""

from luthier.api import Component, hookimpl


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="stage",
            name="base",
            summary="Take a model from a folder or the hub, checked before anything is trained",
            config="luthier_plugins.base.config:BaseConfig",
            impl="luthier_plugins.base.stage:Base",
            revision=2,
        ),
        Component(
            kind="stage",
            name="adapter",
            summary="Take an adapter from a folder or the hub, checked against the model it sits on",
            config="luthier_plugins.base.config:AdapterConfig",
            impl="luthier_plugins.base.adapter:BaseAdapter",
            revision=2,
        ),
    ]
