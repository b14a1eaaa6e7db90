"""The stages that measure models."""

from luthier.api import Component, hookimpl


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="stage",
            name="evaluate",
            summary="Measure a model on held-out rows, beside another one, with gates",
            config="luthier_plugins.evaluate.config:EvaluateConfig",
            impl="luthier_plugins.evaluate.stage:Evaluate",
            revision=4,
        ),
        Component(
            kind="stage",
            name="lm_eval",
            summary="Run tasks of lm-evaluation-harness, beside another model, with gates",
            config="luthier_plugins.evaluate.harness_config:HarnessConfig",
            impl="luthier_plugins.evaluate.harness:Harness",
        ),
    ]
