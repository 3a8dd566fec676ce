"""Prints tables and facts no wider than the terminal.

Without a terminal, `COLUMNS` gives the width; without either, a row stays on one line.
"""

import os
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.cells import cell_len

from hatrack.errors import CONTROLS_TO_SPACES

GAP = 2
LABEL = 10
UNLIMITED = 10**6


def program() -> str:
    """What to type for `hatrack`: its path, as it was started, if it is not on the PATH (`.venv/bin/hatrack`)."""
    started = sys.argv[0]
    return started if Path(started).name == "hatrack" and shutil.which("hatrack") is None else "hatrack"


def width() -> int:
    """Returns the width to print in."""
    is_known = os.environ.get("COLUMNS", "").isdigit() or sys.stdout.isatty()
    return shutil.get_terminal_size().columns if is_known else UNLIMITED


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows of cells, the header first. If they are too wide, lists each row's cells below its first."""
    rows = [[cell.translate(CONTROLS_TO_SPACES) for cell in row] for row in rows]  # from other people's files
    widths = _widths(rows)
    if sum(widths) + GAP * (len(widths) - 1) <= width():
        for row in rows:
            print((" " * GAP).join(map(_pad_right, row, widths)).rstrip())
        return
    for row in rows[1:]:
        print(row[0])
        print(_wrap(", ".join(cell for cell in row[1:] if cell), "  ", "  "))


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Prints numbers with a header row and a column of names. Columns that do not fit become another table below."""
    names, limit = [row[0] for row in rows], width()
    first = max(map(cell_len, names))
    columns = [[row[place] for row in rows] for place in range(1, len(rows[0]))]
    widths = [max(max(map(cell_len, column[1:])), *map(cell_len, column[0].split())) for column in columns]
    start = 0
    while start < len(columns):
        end = start + 1
        while end < len(columns) and first + sum(GAP + each for each in widths[start : end + 1]) <= limit:
            end += 1
        if start:
            print()
        heads = [textwrap.wrap(column[0], each) for column, each in zip(columns, widths, strict=True)][start:end]
        height = max(map(len, heads))
        lines = [[""] * (height - len(head)) + head for head in heads]
        for words in zip(*lines, strict=True):
            _print_numbers("", words, first, widths[start:end])
        for place, name in enumerate(names[1:], 1):
            _print_numbers(name, [column[place] for column in columns[start:end]], first, widths[start:end])
        start = end


def print_facts(facts: Mapping[str, str]) -> None:
    """Prints `name  value` lines; long values are wrapped."""
    for name, value in facts.items():
        print(_wrap(f"{name:<{LABEL}} {value}".translate(CONTROLS_TO_SPACES), " " * (LABEL + 1)).rstrip())


def _wrap(text: str, indent: str, first: str = "") -> str:
    """Wraps text to the width. Words, such as paths, are not broken."""
    wrapper = textwrap.TextWrapper(
        width(),
        initial_indent=first,
        subsequent_indent=indent,
        replace_whitespace=False,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(wrapper.wrap(text))


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(cell_len(row[place]) for row in rows) for place in range(len(rows[0]))]


def _pad_right(cell: str, size: int) -> str:
    return cell + " " * (size - cell_len(cell))


def _print_numbers(name: str, cells: Sequence[str], first: int, widths: Sequence[int]) -> None:
    right = [" " * (GAP + size - cell_len(cell)) + cell for cell, size in zip(cells, widths, strict=True)]
    print((_pad_right(name, first) + "".join(right)).rstrip())
