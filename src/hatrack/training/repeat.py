"""Reads the recipe of a finished adapter, to train it again with changes."""

from pathlib import Path
from typing import Any

from hatrack.adapter.card import read_card
from hatrack.adapter.registry import find_adapter
from hatrack.errors import AdapterError
from hatrack.recipe import Recipe

DROPPED_OPTIONS = ("output", "name", "resume", "overwrite")
REPLACES = {"steps": "epochs", "epochs": "steps"}
"""Giving one of these options drops the other from the recipe."""


def recipe_of_adapter(adapter: str | Path, **changes: Any) -> Recipe:
    """Returns the recipe that `adapter` (a folder, or a name on the rack) was trained with, with `changes`.

    Raises AdapterError if there is no such adapter, or if hatrack did not train it; RecipeError if a change is invalid.
    """
    folder = find_adapter(adapter)
    card = read_card(folder)
    if card is None or not card.recipe:
        raise AdapterError(
            "only an adapter that hatrack trained can be trained again",
            got=f"{adapter}, which has no recipe",
            fix="give base and data",
        )
    dropped = {*DROPPED_OPTIONS, *(REPLACES[name] for name in changes if name in REPLACES)}
    recipe = card.recipe
    options = {name: value for name, value in recipe.items() if name in Recipe.model_fields and name not in dropped}
    return Recipe.make(**(options | changes))
