"""Rows of a file with their row numbers, counted from 1 without the header.

Knows nothing of file formats, tasks or labels.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hatrack.console import say_once
from hatrack.errors import DataError

_INDEX = re.compile(r"(Unnamed: \d+(\.\d+)*|__index_level_\d+__)?")
"""Names of pandas' index columns: empty in CSV, `Unnamed: 0` once that is read and written again."""
_DIGITS = re.compile(r"\d+", re.ASCII)


@dataclass(frozen=True)
class Rows:
    """The rows of one source, each column -> value. `numbers` counts rows from 1, without the header.

    `problems` are the rows that could not be read: their numbers and the reasons.
    """

    source: str
    columns: tuple[str, ...]
    rows: list[dict[str, Any]]
    numbers: list[int]
    problems: list[tuple[int, str]] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """sha256 of the content, whatever the file's path."""
        text = json.dumps([self.columns, self.rows], sort_keys=True, default=str, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def from_cells(
    source: str, header: Sequence[str], rows: Sequence[tuple[int, Sequence[str]]], problems: Sequence[tuple[int, str]]
) -> Rows:
    """Rows from a header and, by row number, the cells of each row, one per column.

    Leaves out empty columns without a name and pandas' index. Raises DataError if another column has no name, or two
    have the same.
    """
    left_out = _unread_columns(source, header, lambda position: [cells[position] for _, cells in rows])
    kept = [(position, name) for position, name in enumerate(header) if position not in left_out]
    check_names(source, header, [name for _, name in kept])
    found = [{name: cells[position] for position, name in kept} for _, cells in rows]
    return Rows(source, tuple(name for _, name in kept), found, [number for number, _ in rows], list(problems))


def from_objects(
    source: str,
    rows: Sequence[tuple[int, dict[str, Any]]],
    problems: Sequence[tuple[int, str]] = (),
    columns: Sequence[str] | None = None,
) -> Rows:
    """Rows from objects by row number; `columns` defaults to all of their keys. Leaves out columns as `from_cells`."""
    names = list(columns if columns is not None else dict.fromkeys(name for _, row in rows for name in row))
    left_out = _unread_columns(source, names, lambda position: [row.get(names[position]) for _, row in rows])
    left_out_names = {names[position] for position in left_out}
    found = [
        {name: value for name, value in row.items() if name not in left_out_names} if left_out_names else row
        for _, row in rows
    ]
    kept = tuple(name for name in names if name not in left_out_names)
    return Rows(source, kept, found, [number for number, _ in rows], list(problems))


def check_names(source: str, header: Sequence[str], kept: Sequence[str]) -> None:
    """Raises DataError if one of the columns to keep has no name, or two have the same."""
    if not kept or len(set(kept)) < len(kept) or not all(name.strip() for name in kept):
        raise DataError(
            f"the header of {source} needs one name for each column",
            got=", ".join(map(repr, header)),
            fix="rename them" if all(name.strip() for name in kept) else "give each column a name",
            gotcha="columns-without-a-name",
        )


def is_index_column(name: str) -> bool:
    """Whether a column has the name of an index that pandas wrote, or none."""
    return _INDEX.fullmatch(name.strip()) is not None


def _unread_columns(source: str, header: Sequence[str], column: Callable[[int], Sequence[Any]]) -> set[int]:
    """The indices of columns that are not read: without a name of their own, and empty or an index. Says which.

    `column` returns the cells of a column, by its index.
    """
    nameless = {position: column(position) for position, name in enumerate(header) if is_index_column(name)}
    empty = {position for position, cells in nameless.items() if not any(_as_text(cell) for cell in cells)}
    index = sorted(
        position
        for position, cells in nameless.items()
        if position not in empty and all(_DIGITS.fullmatch(_as_text(cell)) for cell in cells)
    )
    if index:
        names = " and ".join(
            header[position] if header[position].strip() else f"column {position + 1}" for position in index
        )
        no_name = "" if all(header[position].strip() for position in index) else ", which has no name"
        say_once(f"{source}: not read: {names}{no_name} (pandas' index, which index=False leaves out)")
    if empty:
        count = f"{len(empty)} columns" if len(empty) > 1 else "a column"
        say_once(f"{source}: not read: {count} without a name or content")
    return empty | set(index)


def _as_text(cell: Any) -> str:
    return "" if cell is None else str(cell).strip()
