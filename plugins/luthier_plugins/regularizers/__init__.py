"""Against forgetting: penalties for moving away from what a model was."""

from luthier.api import Component, hookimpl


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="regularizer",
            name="l2sp",
            summary="The squared distance of weights from where they began",
            config="luthier_plugins.regularizers.config:L2spConfig",
            impl="luthier_plugins.regularizers.l2sp:L2sp",
        ),
        Component(
            kind="regularizer",
            name="ewc",
            summary="The same, each weight held as much as data that you name depends on it",
            config="luthier_plugins.regularizers.config:EwcConfig",
            impl="luthier_plugins.regularizers.ewc:Ewc",
        ),
    ]
