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
            name="mergekit",
            summary="Any method that is registered with mergekit, tensor by tensor",
            config="luthier_plugins.merge_methods.config:MergekitConfig",
            impl="luthier_plugins.merge_methods.mergekit:Mergekit",
        ),
        Component(
            kind="merge",
            name="model_stock",
            summary="Towards the models' mean, as far as their task vectors agree in direction",
            config="luthier_plugins.merge_methods.config:ModelStockConfig",
            impl="luthier_plugins.merge_methods.model_stock:ModelStock",
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
            name="task_arithmetic",
            summary="Add up the task vectors",
            config="luthier_plugins.merge_methods.config:TaskArithmeticConfig",
            impl="luthier_plugins.merge_methods.task_arithmetic:TaskArithmetic",
        ),
        Component(
            kind="merge",
            name="ties",
            summary="Trim task vectors, elect signs, average what agrees",
            config="luthier_plugins.merge_methods.config:TiesConfig",
            impl="luthier_plugins.merge_methods.ties:Ties",
        ),
    ]
