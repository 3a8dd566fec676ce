"""`hatrack.compare`: adapters by their names, on rows in a file or in memory. Knows nothing of how it is shown."""

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
    """Scores the base and adapters on the same rows, which none of them was trained on.

    `adapters` are folders or names on the rack (a list of them too), or one loaded `Hat` with all that is attached to
    it. `data` is a path, or rows as `hatrack.train` takes them; without it, the rows that all adapters held out.
    `options` name its columns (`text`, `label`, `prompt`, `completion`, `messages`), say `bad_rows="skip"`, or are
    options of `hatrack.load`.
    One adapter gives its `Comparison` with the base (`metric`, `base`, `adapter`, `difference`, `ci95`, `rows`,
    `verdict`), several give `Comparisons` (`adapters`, `pairs`).
    Raises AdapterError where they cannot be compared, DataError where too few rows are left.
    """
    several = [each for given in adapters for each in (given if isinstance(given, list) else [given])]
    if not several:
        raise RecipeError("no adapter was named", fix='name one, such as hatrack.compare("reviews")')
    reading = {name: options.pop(name) for name in (*COLUMNS, "bad_rows") if name in options}
    loaded = [adapter for adapter in several if isinstance(adapter, Hat)]
    if loaded and (len(several) > 1 or options):
        raise RecipeError("a loaded Hat is compared by itself", fix="attach the others to it with add")
    hat = loaded[0] if loaded else load([str(adapter) for adapter in several], **options)
    source = (
        data if data is None or isinstance(data, str) else str(data) if isinstance(data, Path) else cache_rows(data)
    )
    found = compare_on(hat, held_out_rows(hat, source, **reading))
    return found if len(found.adapters) > 1 else next(iter(found.adapters.values()))
