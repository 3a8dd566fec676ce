"""Rows of a data set on the hub. Importing `datasets` takes a second, so it happens when one is asked for."""

import importlib
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
    named = {
        column: feature.names for column, feature in found.features.items() if isinstance(feature, datasets.ClassLabel)
    }
    rows = [
        {
            column: named[column][value] if column in named and value is not None and value >= 0 else value
            for column, value in row.items()
        }
        for row in found
    ]
    return tuple(found.column_names), rows
