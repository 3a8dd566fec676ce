"""`hatrack.compare`: compares adapters given by name, on rows in a file or in memory."""

from pathlib import Path
from typing import Any

from hatrack.data.in_memory import cache_rows
from hatrack.errors import RecipeError
from hatrack.evaluate.compare import Comparison, Comparisons
from hatrack.evaluate.compare import compare as compare_on
from hatrack.evaluate.held_out import COLUMNS, held_out_rows
from hatrack.inference.hat import Hat
from hatrack.inference.load import load


def compare(
    *adapters: str | Path | Hat | list[str | Path], data: Any = None, **options: Any
) -> Comparison | Comparisons:
    """Compares adapters with their base on rows that none of them was trained on.

    `adapters`: folders or names on the rack (or a list of them), or one loaded `Hat` with all its adapters. `data`: a
    path, or rows as `hatrack.train` takes them; by default the rows that all adapters held out. `options`: the columns
    of `data` (`text`, `label`, `prompt`, `completion`, `messages`), `bad_rows` (refuse or skip), and the options of
    `hatrack.load`.

    Returns a `Comparison` for one adapter, `Comparisons` for several. Raises AdapterError where they cannot be
    compared, DataError if too few rows are left, RecipeError for an invalid option, and what `hatrack.load` raises.
    """
    found = [each for given in adapters for each in (given if isinstance(given, list) else [given])]
    if not found:
        raise RecipeError("no adapter was named", fix='name one, such as hatrack.compare("reviews")')
    read_options = {name: options.pop(name) for name in (*COLUMNS, "bad_rows") if name in options}
    loaded = [adapter for adapter in found if isinstance(adapter, Hat)]
    if loaded and (len(found) > 1 or options):
        raise RecipeError("a loaded Hat is compared by itself", fix="attach the others to it with add")
    hat = loaded[0] if loaded else load([str(adapter) for adapter in found], **options)
    source = (
        data if data is None or isinstance(data, str) else str(data) if isinstance(data, Path) else cache_rows(data)
    )
    result = compare_on(hat, held_out_rows(hat, source, **read_options))
    return result if len(result.adapters) > 1 else next(iter(result.adapters.values()))
