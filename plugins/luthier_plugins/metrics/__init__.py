"""The metrics that come with Luthier."""

from luthier.api import Component, hookimpl


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="metric",
            name="exact_match",
            summary="The share of answers that equal the reference",
            config="luthier_plugins.metrics.config:ExactMatchConfig",
            impl="luthier_plugins.metrics.exact_match:ExactMatch",
        ),
        Component(
            kind="metric",
            name="perplexity",
            summary="The exponential of the mean loss per target token",
            config="luthier_plugins.metrics.config:PerplexityConfig",
            impl="luthier_plugins.metrics.perplexity:Perplexity",
        ),
    ]
