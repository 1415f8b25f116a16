"""Reading a recipe: YAML, overrides, validation and the checks that need no model in memory."""

from dist_ft.recipe.errors import RecipeError
from dist_ft.recipe.load import load_recipe
from dist_ft.recipe.packaged import packaged_recipes

__all__ = ["RecipeError", "load_recipe", "packaged_recipes"]
