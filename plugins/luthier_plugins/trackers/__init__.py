"""Where metrics go beside a run's own events."""

from luthier.api import Component, hookimpl


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="tracker",
            name="jsonl",
            summary="A file of JSON lines for each stage and key",
            config="luthier_plugins.trackers.config:JsonlConfig",
            impl="luthier_plugins.trackers.jsonl:Jsonl",
        ),
        Component(
            kind="tracker",
            name="tensorboard",
            summary="TensorBoard event files for each stage and key",
            config="luthier_plugins.trackers.config:TensorBoardConfig",
            impl="luthier_plugins.trackers.tensorboard:TensorBoard",
        ),
    ]
