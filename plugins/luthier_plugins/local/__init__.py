"""The executor that runs workers on this machine."""

from luthier.api import Component, hookimpl


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="executor",
            name="local",
            summary="Worker processes on this machine",
            config="luthier_plugins.local.config:LocalConfig",
            impl="luthier_plugins.local.executor:Local",
        )
    ]
