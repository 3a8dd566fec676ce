"""Prevents the import of packages that a command does not need.

transformers and peft import some optional packages if they are installed, which takes a second and 150 MiB. They work
without a package that is not installed, and `None` in `sys.modules` makes a package appear so. This affects the whole
process, so only commands do it, never the library.
"""

import sys
from pathlib import Path

from hatrack.recipe import Recipe
from hatrack.wheels import is_pypi

QUANTIZERS = {"bitsandbytes", "scipy"}  # transformers uses scipy for the losses of object detection


def skip_unused_imports(recipe: Recipe) -> None:
    """Skips the packages that a run of `recipe` does not need. Must be called before transformers is imported.

    Skips nothing if a tracker is used (it may need any package), or if a run is resumed (its recipe is not read yet).
    """
    if recipe.report_to != "none" or recipe.resume:
        return
    unused: set[str] = set()
    if recipe.quantize == "none":
        unused |= QUANTIZERS
    sources = (str(source) for source in (recipe.data, recipe.eval_data) if source is not None)
    if all(is_pypi(source) or Path(source).is_file() for source in sources):
        unused.add("datasets")  # which imports pandas
    _skip(unused)


def skip_quantizers(*adapters: str) -> None:
    """Skips the quantization packages if none of the adapters was trained on a quantized base.

    Raises AdapterError, before anything slow is imported, if an adapter is missing or its hatrack.json is damaged.
    """
    from hatrack.adapter.card import read_card
    from hatrack.adapter.registry import find_adapter

    cards = [read_card(find_adapter(adapter)) for adapter in adapters]
    if all(card is not None and card.recipe.get("quantize", "none") == "none" for card in cards):
        _skip(QUANTIZERS)


def _skip(packages: set[str]) -> None:
    if "transformers" not in sys.modules:
        for name in packages:
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]
