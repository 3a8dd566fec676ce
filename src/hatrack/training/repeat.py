"""The recipe of a finished adapter, to train it once more with changes. Knows nothing of how it is trained."""

from pathlib import Path
from typing import Any

from hatrack.adapter.card import read_card
from hatrack.adapter.registry import find_adapter
from hatrack.errors import AdapterError
from hatrack.recipe import Recipe

OF_ONE_RUN = ("output", "name", "resume", "overwrite")
EXCLUDING = {"steps": "epochs", "epochs": "steps"}
"""Options of which the later one wins."""


def recipe_of_adapter(adapter: str | Path, **changes: Any) -> Recipe:
    """The recipe that `adapter` (a folder, or a name on the rack) was trained by, with `changes`.

    Raises AdapterError where there is no such adapter, or where it was made elsewhere and so has no recipe;
    RecipeError where a change is wrong.
    """
    folder = find_adapter(adapter)
    hat = read_card(folder)
    if hat is None or not hat.recipe:
        raise AdapterError(
            "only a run of hatrack can be repeated", got=f"{adapter}, which has no recipe", fix="give base and data"
        )
    dropped = {*OF_ONE_RUN, *(EXCLUDING[name] for name in changes if name in EXCLUDING)}
    then = {name: value for name, value in hat.recipe.items() if name in Recipe.model_fields and name not in dropped}
    return Recipe.make(**(then | changes))
