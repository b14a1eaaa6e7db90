"""What answers: models of a recipe, files for llama.cpp, and servers."""

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
            name="openai",
            summary="A server with OpenAI's chat completions",
            config="luthier_plugins.generators.config:OpenAIConfig",
            impl="luthier_plugins.generators.openai:OpenAI",
        ),
    ]
