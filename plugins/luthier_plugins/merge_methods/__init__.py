"""Merge methods that work parameter by parameter: one small file each."""

from luthier.api import Component, hookimpl


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="merge",
            name="linear",
            summary="Weighted average of the models (model soup)",
            config="luthier_plugins.merge_methods.config:LinearConfig",
            impl="luthier_plugins.merge_methods.linear:Linear",
        ),
        Component(
            kind="merge",
            name="slerp",
            summary="Spherical interpolation between two models",
            config="luthier_plugins.merge_methods.config:SlerpConfig",
            impl="luthier_plugins.merge_methods.slerp:Slerp",
        ),
        Component(
            kind="merge",
            name="ties",
            summary="Trim task vectors, elect signs, average what agrees",
            config="luthier_plugins.merge_methods.config:TiesConfig",
            impl="luthier_plugins.merge_methods.ties:Ties",
        ),
    ]
