"""Saves rows given in Python (a list, a DataFrame, a datasets.Dataset) as JSON Lines in the cache.

A run records its data as a path, so rows in memory are saved under a hash of their content. Resuming, comparing and
repeating then work as with any file. Knows nothing of tasks.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hatrack.data.hub import named_classes
from hatrack.errors import DataError, short_repr
from hatrack.storage import cache_dir, write_file

FILE = "rows.jsonl"


def cache_rows(data: Any) -> str:
    """Saves `data` in the cache and returns the path of the file.

    `data` is a list of rows (one dict each, column -> value), a dict of columns (name -> list of values), or a table of
    pandas, polars, pyarrow or datasets; the class numbers of a datasets.Dataset become their names.
    Raises DataError if it is anything else, or holds values that JSON cannot hold.
    """
    rows = _to_dicts(data)
    if not rows:
        raise DataError("the data has no rows", got=f"an empty {type(data).__name__}", fix="give it at least 2")
    lines = [json.dumps(_json_value(row, number), ensure_ascii=True) for number, row in enumerate(rows, 1)]
    content = "\n".join(lines) + "\n"
    path = cache_dir("data") / hashlib.sha256(content.encode()).hexdigest()[:16] / FILE
    if not path.exists():
        write_file(path, content)
    return str(path)


def source_name(source: str, option: str = "data") -> str:
    """What messages call a source: its path or name, or `option` if `cache_rows` saved it."""
    path = Path(source)
    if path.name != FILE or path.parent.parent.name != "data":  # cache_dir would create the folder
        return source
    return option if path.parent.parent == cache_dir("data") else source


def _to_dicts(data: Any) -> Sequence[Any]:
    """The rows, each a dict."""
    if isinstance(data, Mapping) and any(hasattr(part, "column_names") for part in data.values()):
        parts = ", ".join(map(str, data))
        raise DataError(
            "a DatasetDict holds several data sets",
            got=f"splits {parts}",
            fix=f"give one, such as data[{next(iter(data))!r}]",
        )
    if isinstance(data, Mapping) and data:
        lengths = {
            -1 if isinstance(values, str) or not hasattr(values, "__len__") else len(values) for values in data.values()
        }
        if len(lengths) != 1 or -1 in lengths:
            raise DataError(
                "a dict of columns needs one list of values per column, all of the same length",
                got=short_repr(dict(data)),
                fix='give {"text": [...], "label": [...]}, or a list of rows',
            )
        return [dict(zip(data, values, strict=True)) for values in zip(*data.values(), strict=True)]
    if hasattr(data, "features") and hasattr(data, "column_names"):  # datasets.Dataset
        return named_classes(data)[1]
    if hasattr(data, "reset_index") and hasattr(data, "columns"):  # a pandas index with a name is read as a column
        data = data.reset_index([name for name in data.index.names if name is not None and name not in data.columns])
    for method, options in (("to_dicts", {}), ("to_pylist", {}), ("to_dict", {"orient": "records"})):
        if hasattr(data, method) and hasattr(data, "columns"):  # polars, pyarrow, pandas
            return list(getattr(data, method)(**options))
    if isinstance(data, Sequence) and not isinstance(data, str | bytes):
        wrong = next((row for row in data if not isinstance(row, Mapping)), None)
        if wrong is None:
            return data
        raise DataError(
            "each row must be a dict, column -> value", got=short_repr(wrong), fix='give {"text": ..., ...}'
        )
    raise DataError(
        "the data must be a path, a list of rows, a DataFrame or a datasets.Dataset",
        got=type(data).__name__,
        fix="give one of these",
    )


def _json_value(value: Any, row: int) -> Any:
    """A value that JSON can hold: numpy numbers as numbers, missing values as None."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, Mapping):
        return {str(name): _json_value(item, row) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item, row) for item in value]
    if hasattr(value, "tolist"):  # numpy numbers and arrays
        return _json_value(value.tolist(), row)
    if hasattr(value, "isoformat"):
        return value.isoformat() if value == value else None  # a missing time does not equal itself
    if type(value).__name__ == "NAType":
        return None
    raise DataError(
        f"row {row} holds a value that is not a text, number or list", got=short_repr(value), fix="convert it"
    )
