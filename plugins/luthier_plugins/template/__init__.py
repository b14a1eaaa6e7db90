"""The augmenter that fills templates."""

from luthier.api import Component, hookimpl


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="augmenter",
            name="template",
            summary="Fill the slots of Jinja templates from lists, ranges, random letters, files and columns",
            config="luthier_plugins.template.config:TemplateConfig",
            impl="luthier_plugins.template.expand:Template",
        )
    ]
