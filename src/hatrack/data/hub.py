"""Rows of a data set on the hub. Importing `datasets` takes a second, so it happens when one is asked for."""

import importlib
from collections.abc import Sequence
from typing import Any

from hatrack.errors import DataError


def hub_rows(name: str) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """Columns and rows of the `train` split; numbered classes become their names.

    Raises DataError where there is no such data set or no way to fetch it.
    """
    datasets = importlib.import_module("datasets")
    try:
        found = datasets.load_dataset(name, split="train")
    except Exception as error:  # the library raises many kinds; all mean that these rows cannot be had
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{name} is neither a file here nor a data set that can be fetched",
            got=reason,
            fix="check the path or the name",
        ) from error
    return named_classes(found)


def named_classes(found: Any) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """Columns and rows of a `datasets.Dataset`; numbered classes become their names."""
    class_label = importlib.import_module("datasets").ClassLabel
    inner = {column: getattr(feature, "feature", feature) for column, feature in found.features.items()}
    classes = {column: kind.names for column, kind in inner.items() if isinstance(kind, class_label)}
    rows = [
        {column: _named(value, classes[column]) if column in classes else value for column, value in row.items()}
        for row in found
    ]
    return tuple(found.column_names), rows


def _named(value: Any, names: Sequence[str]) -> Any:
    """The name of a numbered class, or of each in a list; -1 is how data sets write that there is none."""
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    return names[value] if value is not None and value >= 0 else None
