"""From YAML to a validated recipe, with line numbers."""

from luthier.recipe.recipe import ConfiguredStage, Recipe

__all__ = ["ConfiguredStage", "Recipe"]
