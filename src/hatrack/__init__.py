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

from hatrack.errors import HatrackError
from hatrack.recipe import Recipe

if TYPE_CHECKING:
    from hatrack.engine.fast_base import speed_up
    from hatrack.engine.fast_lora import get_peft_model
    from hatrack.hat import Hat, load

__version__ = "0.1.0"
__all__ = ["Hat", "HatrackError", "Recipe", "get_peft_model", "load", "speed_up", "train"]

_LATER = {
    "Hat": "hatrack.hat",
    "get_peft_model": "hatrack.engine.fast_lora",
    "load": "hatrack.hat",
    "speed_up": "hatrack.engine.fast_base",
}

# a kernel for repacked weights, of which hatrack has none
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda told: "gemm_4bit_forward" not in str(told.msg))


def train(recipe: Recipe | str | Path | None = None, /, **options: Any) -> "Hat":
    """Trains an adapter from a recipe, the path of one, or options by name; options win.

    Returns it ready to use. Raises HatrackError, see `hatrack.errors`.
    """
    if isinstance(recipe, str | Path):
        recipe = Recipe.read(recipe, **options)
    elif recipe is None:
        recipe = Recipe.make(**options)
    elif options:
        recipe = recipe.changed(**options)
    run = importlib.import_module("hatrack.engine.train").train
    return run(recipe)  # type: ignore[no-any-return]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module 'hatrack' has no attribute {name!r}")
