"""hatrack: fine-tune a language model on the machine you have.

    hat = hatrack.train(base="distilbert-base-uncased", task="classify", data="reviews.csv")
    hat.predict(["A three-hour cinema master class."])

Nothing happens at import, except that one log message of bitsandbytes is left out; torch is imported with the first
name that needs it.
"""

import importlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hatrack.errors import HatrackError, RecipeError
from hatrack.recipe import Recipe

if TYPE_CHECKING:
    from hatrack.evaluate.by_name import compare
    from hatrack.inference.hat import Hat
    from hatrack.inference.load import load
    from hatrack.layers.fast_base import speed_up
    from hatrack.layers.fast_lora import get_peft_model
    from hatrack.training.forecast import Forecast

__version__ = "0.1.0"
__all__ = ["Hat", "HatrackError", "Recipe", "compare", "get_peft_model", "load", "plan", "speed_up", "train"]

_LATER = {
    "Hat": "hatrack.inference.hat",
    "compare": "hatrack.evaluate.by_name",
    "get_peft_model": "hatrack.layers.fast_lora",
    "load": "hatrack.inference.load",
    "speed_up": "hatrack.layers.fast_base",
}

# a kernel for repacked weights, of which hatrack has none
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda told: "gemm_4bit_forward" not in str(told.msg))


def train(recipe: Recipe | str | Path | None = None, /, *, like: Any = None, **options: Any) -> "Hat":
    """Trains an adapter from a recipe, the path of one (.yaml) or of a data file, or options by name; options win.

    `data` and `eval_data` may be paths, lists of rows (one dict each), DataFrames or `datasets.Dataset`s. `like`, a
    folder or a name on the rack, repeats the run of that adapter with the options given changed.
    Returns the adapter on its base, ready to use. Raises HatrackError, see `hatrack.errors`.
    """
    made = _recipe(recipe, options, like)
    run = importlib.import_module("hatrack.training.train").train
    return run(made)  # type: ignore[no-any-return]


def plan(
    recipe: Recipe | str | Path | None = None, /, *, on: Any = None, like: Any = None, **options: Any
) -> "Forecast":
    """What training would take, and whether it fits, before any weight is read; arguments as `train` takes them.

    `on` plans for another machine than this one: the name of a GPU or a laptop ("rtx4090", "a100", "m2"), or memory
    ("16GiB"). The result has `plan` (`fits`, `peak_memory_bytes`, `seconds`, ...), `ways` and `change`.
    """
    made = _recipe(recipe, options, like)
    return importlib.import_module("hatrack.training.forecast").plan(made, on)  # type: ignore[no-any-return]


def _recipe(recipe: Recipe | str | Path | None, options: dict[str, Any], like: str | Path | None = None) -> Recipe:
    """One recipe of all that was given; rows in memory are kept in a file."""
    for name in ("data", "eval_data"):
        if not isinstance(options.get(name), str | Path | None):
            options = options | {name: importlib.import_module("hatrack.data.in_memory").cache_rows(options[name])}
    if like is not None:
        if recipe is not None:
            raise RecipeError("a recipe and `like` exclude each other", got=f"{recipe!r}, {like}", fix="keep one")
        return importlib.import_module("hatrack.training.repeat").recipe_of_adapter(like, **options)  # type: ignore[no-any-return]
    if isinstance(recipe, str | Path):
        return Recipe.of(recipe, **options)
    return recipe.changed(**options) if recipe is not None else Recipe.make(**options)


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module 'hatrack' has no attribute {name!r}")
