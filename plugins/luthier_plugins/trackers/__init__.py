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
        Component(
            kind="tracker",
            name="wandb",
            summary="Weights & Biases, online or offline",
            config="luthier_plugins.trackers.config:WandbConfig",
            impl="luthier_plugins.trackers.wandb:Wandb",
        ),
        Component(
            kind="tracker",
            name="mlflow",
            summary="MLflow, at a server or in a database",
            config="luthier_plugins.trackers.config:MlflowConfig",
            impl="luthier_plugins.trackers.mlflow:Mlflow",
        ),
        Component(
            kind="tracker",
            name="trackio",
            summary="Trackio, on this machine or in a Space",
            config="luthier_plugins.trackers.config:TrackioConfig",
            impl="luthier_plugins.trackers.trackio:Trackio",
        ),
    ]
