"""What `hatrack predict` is asked: rows from arguments, standard input or a file, in their order and none left out.

Files are read as data to train on is. Knows nothing of adapters.
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
class Asked:
    """One row: the text or conversation to answer, or the `problem` with it; its number, and its `cells` by column."""

    row: int
    prompt: Any
    problem: str = ""
    cells: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Where rows come from: what messages call it, and either a table or texts, which may come as they are typed."""

    name: str
    table: Rows | None = None
    texts: Iterable[str | None] = ()
    streamed: bool = False

    def columns(self, own: str) -> tuple[str, ...]:
        """The columns of the rows; texts have one, `own`."""
        return self.table.columns if self.table is not None else (own,)


def open_source(texts: Sequence[str] | None, file: Path | None, column: str | None) -> Source:
    """Where the rows come from. Raises DataError or RecipeError where there are none, or they cannot be read."""
    if texts and file:
        raise RecipeError("texts come from the arguments or from --file, not both", fix="leave one out")
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
        return Source("the arguments", texts=[_as_typed(text) for text in texts])
    if sys.stdin.isatty():
        raise RecipeError("there is no text to answer", fix='add one ("a text"), --file FILE, or pipe lines in')
    regular = stat.S_ISREG(os.fstat(0).st_mode)
    return Source("standard input", texts=_standard_input(whole=regular), streamed=not regular)


def read_asked(source: Source, task: str, column: str | None, named: Mapping[str, str]) -> Iterator[Asked]:
    """Every row of a source, as an adapter for `task` is asked it. `named` are the columns it was trained on, by role.

    Raises DataError where a table does not tell which of its columns is asked.
    """
    if source.table is not None:
        yield from _table(source.table, task, column, named)
        return
    own = "text" if task == "classify" else "prompt"
    for number, text in enumerate(source.texts, 1):
        problem = "the text is not UTF-8" if text is None else text_problem(text)
        yield Asked(number, text, problem, {own: text})


def _table(table: Rows, task: str, column: str | None, named: Mapping[str, str]) -> Iterator[Asked]:
    named = named if column is None else {"text": column, "prompt": column}
    columns = find_prompt_columns(task, table.columns, table.source, named)
    asked = [Asked(number, None, words) for number, words in table.problems]
    for number, cells in zip(table.numbers, table.rows, strict=True):
        found = read_prompt(number, cells, task, columns)
        if isinstance(found, BadRow):
            asked.append(Asked(number, cells.get(next(iter(columns.values()))), found.reason, cells))
        else:
            asked.append(Asked(number, found, "", cells))
    yield from sorted(asked, key=lambda each: each.row)


def _as_typed(argument: str) -> str:
    """An argument as UTF-8, which is what terminals send, also where the system's locale is a lesser one.

    Raises RecipeError where it is a file: then its content was meant.
    """
    try:
        is_file = Path(argument).is_file()
    except (OSError, ValueError):  # far too long for a name, or with a NUL in it
        is_file = False
    if is_file:
        raise RecipeError(
            "that is a file, not a text",
            got=argument,
            fix=f"--file {argument} answers its rows",
        )
    try:
        return os.fsencode(argument).decode()
    except UnicodeDecodeError:
        return argument


def _standard_input(*, whole: bool) -> Iterator[str | None]:
    """The lines of standard input, from a pipe as they come; None for one that is not UTF-8."""
    binary = getattr(sys.stdin, "buffer", None)
    if binary is None:  # text in memory, put there by whoever runs us in their process
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
