"""Reads data sets from the hub. Imports `datasets` only when needed: it takes a second."""

import importlib
from collections.abc import Sequence
from typing import Any

from hatrack.errors import DataError


def hub_rows(name: str) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """Columns and rows of the `train` split, with names for class numbers.

    Raises DataError if there is no such data set or it cannot be fetched.
    """
    datasets = importlib.import_module("datasets")
    try:
        found = datasets.load_dataset(name, split="train")
    except Exception as error:  # the library raises many kinds; all mean that there are no rows
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{name} is neither a file here nor a data set that can be fetched",
            got=reason,
            fix="check the path or the name",
        ) from error
    return named_classes(found)


def named_classes(found: Any) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """Columns and rows of a `datasets.Dataset`, with names for class numbers."""
    class_label = importlib.import_module("datasets").ClassLabel
    inner = {column: getattr(feature, "feature", feature) for column, feature in found.features.items()}
    classes = {column: kind.names for column, kind in inner.items() if isinstance(kind, class_label)}
    rows = [
        {column: _class_name(value, classes[column]) if column in classes else value for column, value in row.items()}
        for row in found
    ]
    return tuple(found.column_names), rows


def _class_name(value: Any, names: Sequence[str]) -> Any:
    """The name of a class number, or of each in a list; None for -1, which means no label."""
    if isinstance(value, list):
        return [_class_name(item, names) for item in value]
    return names[value] if value is not None and value >= 0 else None
