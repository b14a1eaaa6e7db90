"""What answers: models of a recipe, and servers."""

from luthier.api import Component, hookimpl


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="generator",
            name="model",
            summary="A model, an adapter or an export of the recipe",
            config="luthier_plugins.generators.config:ModelGeneratorConfig",
            impl="luthier_plugins.generators.model:ModelGenerator",
        ),
        Component(
            kind="generator",
            name="url",
            summary="A server with OpenAI's chat completions",
            config="luthier_plugins.generators.config:UrlConfig",
            impl="luthier_plugins.generators.url:Url",
        ),
    ]
