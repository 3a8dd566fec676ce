"""Reads the input of `hatrack predict`: rows from arguments, standard input or a file, in order.

Files are read like training data. Knows nothing of adapters.
"""

import os
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hatrack.data.columns import find_prompt_columns
from hatrack.data.read import Rows, decode_lines, is_table, read_lines, read_rows
from hatrack.data.row_values import BadRow, read_prompt, text_problem
from hatrack.errors import DataError, RecipeError


@dataclass(frozen=True)
class InputRow:
    """An input row. `number` counts from 1; `prompt` is its text or conversation; `problem` says why the row is
    invalid, or is empty; `cells` are its values by column."""

    number: int
    prompt: Any
    problem: str = ""
    cells: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Where rows come from: a `table`, or else `texts`. `name` is used in messages; `streamed`: read from a pipe."""

    name: str
    table: Rows | None = None
    texts: Iterable[str | None] = ()
    streamed: bool = False

    def columns(self, text: str) -> tuple[str, ...]:
        """The columns of the rows; plain texts have one, called `text`."""
        return self.table.columns if self.table is not None else (text,)


def open_source(texts: Sequence[str] | None, file: Path | None, column: str | None) -> Source:
    """Opens the arguments, `file` or standard input. Raises RecipeError or DataError if the input is invalid."""
    if texts and file:
        raise RecipeError("texts are given both as arguments and by --file", fix="leave one out")
    table = read_rows(str(file)) if file is not None and is_table(str(file)) else None
    if column is not None and table is None:
        raise RecipeError(
            "--text names a column of a table", got="no table", fix="add --file FILE.csv, or leave it out"
        )
    if table is not None and column is not None and column not in table.columns:
        raise DataError(
            f"{file} has no such column", got=column, fix=f"use --text with one of {', '.join(table.columns)}"
        )
    if table is not None:
        return Source(table.source, table)
    if file is not None:
        return Source(str(file), texts=read_lines(str(file)))
    if texts:
        return Source("the arguments", texts=[_decode_argument(text) for text in texts])
    if sys.stdin.isatty():
        raise RecipeError("there is no input text", fix='add one ("a text"), --file FILE, or pipe lines in')
    regular = stat.S_ISREG(os.fstat(0).st_mode)
    return Source("standard input", texts=_standard_input(whole=regular), streamed=not regular)


def read_input(source: Source, task: str, column: str | None, trained_on: Mapping[str, str]) -> Iterator[InputRow]:
    """Yields every row of a source. `column` is the table's column to read, by default one the adapter was trained on.

    `trained_on`: the columns that the adapter was trained on, by role. Raises DataError if the column is ambiguous.
    """
    if source.table is not None:
        yield from _read_table(source.table, task, column, trained_on)
        return
    name = "text" if task == "classify" else "prompt"
    for number, text in enumerate(source.texts, 1):
        problem = "the text is not UTF-8" if text is None else text_problem(text)
        yield InputRow(number, text, problem, {name: text})


def _read_table(table: Rows, task: str, column: str | None, trained_on: Mapping[str, str]) -> Iterator[InputRow]:
    named = trained_on if column is None else {"text": column, "prompt": column}
    columns = find_prompt_columns(task, table.columns, table.source, named)
    rows = [InputRow(number, None, words) for number, words in table.problems]
    for number, cells in zip(table.numbers, table.rows, strict=True):
        found = read_prompt(number, cells, task, columns)
        if isinstance(found, BadRow):
            rows.append(InputRow(number, cells.get(next(iter(columns.values()))), found.reason, cells))
        else:
            rows.append(InputRow(number, found, "", cells))
    yield from sorted(rows, key=lambda row: row.number)


def _decode_argument(argument: str) -> str:
    """Decodes an argument as UTF-8, whatever the locale. Raises RecipeError if it is the name of a file."""
    try:
        is_file = Path(argument).is_file()
    except (OSError, ValueError):  # too long for a file name, or with a NUL in it
        is_file = False
    if is_file:
        raise RecipeError(
            "the text is the name of a file",
            got=argument,
            fix=f"use --file {argument} to read its rows",
        )
    try:
        return os.fsencode(argument).decode()
    except UnicodeDecodeError:
        return argument


def _standard_input(*, whole: bool) -> Iterator[str | None]:
    """Yields lines of standard input, after reading all of it (`whole`) or as they arrive. None: not UTF-8."""
    binary = getattr(sys.stdin, "buffer", None)
    if binary is None:  # sys.stdin was replaced by text in memory
        yield from decode_lines("standard input", sys.stdin.read().encode())
    elif whole:
        yield from decode_lines("standard input", binary.read())
    else:
        for number, line in enumerate(binary):
            try:
                text = line.decode("utf-8-sig" if number == 0 else "utf-8")
            except UnicodeDecodeError:
                yield None
            else:
                yield text.removesuffix("\n").removesuffix("\r")
