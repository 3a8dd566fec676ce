"""Reads rows from CSV and TSV: finds the separator and what the quotes mean.

A quote that opens by mistake silently swallows rows. So a file is read by RFC 4180 only if no rows seem swallowed.
Otherwise it is read in another way that makes a row of every line, and a message says so; if there is no such way, it
is refused. Knows nothing of encodings, tasks or labels.
"""

import csv
import io
import json
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hatrack.console import say_once
from hatrack.data.table import Rows, from_cells
from hatrack.errors import DataError

csv.field_size_limit(2**31 - 1)

SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}

MIN_ROWS_IN_CELL = 3
"""If one cell has at least this many lines, and all end in a known label, they are rows, not prose."""
LABEL_MAX_LENGTH = 40
"""Characters of the longest cell that can be one of a few labels."""

_BEFORE_QUOTE = re.compile(r"\S +\"")
_SEPARATOR_LINE = re.compile(r'"?sep=([^\w"\\\r\n])"?(\r\n|\r|\n|$)', re.IGNORECASE)
_BACKSLASH_QUOTE = re.compile(r'(?<!\\)((?:\\\\)*)\\"')


class _Record(NamedTuple):
    """The cells of a row or of the header, and its first and last line in the file."""

    cells: list[str]
    first: int
    last: int


@dataclass(frozen=True)
class _Reading:
    """One way to read a file: its records, and its `fault` in words if it has one.

    `ragged` are rows with another number of cells than the header. `swallowed` counts lines inside one cell that look
    like rows, though all quotes close.
    """

    records: list[_Record]
    fault: str = ""
    ragged: list[int] = field(default_factory=list)
    swallowed: int = 0

    @property
    def width(self) -> int:
        """The number of cells of the header."""
        return len(self.records[0].cells) if self.records else 0


def read_csv(source: str, text: str, separator: str) -> Rows:
    """The rows of a table whose first line names its columns.

    `separator` is the usual one for the file's name; another is used if a first line `sep=;` names it, or if the header
    has no other and all rows fit it. Raises DataError if no separator or no meaning of the quotes fits all lines.
    """
    _refuse_json(source, text)
    named = _SEPARATOR_LINE.match(text)
    if named:
        separator = named[1]
        say_once(f"{source}: the first line, {named[0].strip()!r}, names the separator and is not a row")
    lines = list(io.StringIO(text, newline=""))
    skipped = 1 if named else 0
    if not any(line.strip() for line in lines[skipped:]):
        raise DataError(f"{source} is empty", got="no header line", fix="the first line must name the columns")
    separator = _find_separator(source, lines, separator, skipped)
    reading = _best_reading(source, lines, separator, skipped)
    if reading.fault:
        raise _invalid_csv(source, reading.fault)
    header, *records = reading.records
    return _table(source, header.cells, [record.cells for record in records])


def _table(source: str, header: list[str], lines: list[list[str]]) -> Rows:
    rows, problems = [], []
    for number, cells in enumerate(lines, 1):
        if cells == header:
            problems.append((number, "the header again, as if two files were joined"))
        elif _fits(cells, header):
            rows.append((number, [*cells, *[""] * (len(header) - len(cells))][: len(header)]))
        else:
            problems.append((number, f"{len(cells)} cells where the header has {len(header)}"))
    counts = {len(cells) for cells in lines}
    if len(problems) > 1 and not rows and len(counts) == 1:
        raise DataError(
            f"the header of {source} has {len(header)} columns and every row {counts.pop()} cells",
            got=", ".join(map(repr, header)),
            fix="give each column a name",
            gotcha="columns-without-a-name",
        )
    return from_cells(source, header, rows, problems)


def _fits(cells: Sequence[str], header: Sequence[str]) -> bool:
    """Whether a row has a cell for each column up to the last with a name, and only empty ones after it."""
    if len(cells) == len(header):
        return True
    named = max((position for position, name in enumerate(header, 1) if name.strip()), default=len(header))
    return len(cells) >= named and not any(cells[len(header) :])


def _refuse_json(source: str, text: str) -> None:
    """Raises DataError if the text is JSON."""
    start = text.lstrip()
    if start.startswith(("{", "[")):
        try:
            found, end = json.JSONDecoder().raw_decode(start)
        except (ValueError, RecursionError):
            return
        if isinstance(found, dict) or (isinstance(found, list) and start[end:].strip() == ""):
            raise DataError(
                f"{source} is JSON, not CSV",
                got=f"it begins with {start[:30]!r}",
                fix="name it .jsonl" if isinstance(found, dict) else "name it .json",
                gotcha="json-layout",
            )


def _find_separator(source: str, lines: list[str], usual: str, skipped: int) -> str:
    """The separator of a file: the `usual` one if the header has it, or another that the header has and all rows fit.

    Raises DataError if the rows do not fit the header's: every line would be read as one long text.
    """
    header = next(line for line in lines[skipped:] if line.strip()).rstrip("\r\n")
    if usual in header:
        return usual
    others = {mark: _best_reading(source, lines, mark, skipped, say_how=False) for mark in SEPARATORS if mark in header}
    others = {mark: reading for mark, reading in others.items() if reading.width > 1}
    for mark, reading in others.items():
        if not reading.fault and not reading.ragged:
            say_once(f"{source}: read with {SEPARATORS[mark]} between the cells, as its header has them")
            return mark
    if others:
        raise DataError(
            f"{source} is not separated by {SEPARATORS.get(usual, repr(usual))}",
            got=f"the header {header!r}, and rows that do not fit it",
            fix=f"save it with {SEPARATORS.get(usual, repr(usual))} between the cells",
        )
    return usual


def _best_reading(source: str, lines: list[str], separator: str, skipped: int, *, say_how: bool = True) -> _Reading:
    """Returns the reading by the rules of CSV; if it has a fault, another reading without one, and says so.

    If all readings have faults, returns the reading by the rules.
    """
    by_rules = _read_by_rules(lines, separator, skipped)
    if not by_rules.fault and not by_rules.ragged:
        return by_rules
    for words, reading in _other_readings(lines, separator, skipped, by_rules):
        if not reading.fault and not reading.ragged:
            if say_how:
                reason = by_rules.fault or f"another number of cells in row {by_rules.ragged[0]}"
                say_once(f"{source}: {words} (by the rules of CSV there is {reason})")
            return reading
    return by_rules


def _other_readings(
    lines: list[str], separator: str, skipped: int, by_rules: _Reading
) -> Iterator[tuple[str, _Reading]]:
    """Other readings of the quotes, the likeliest first, each with a description."""
    text = "".join(lines)
    if re.search(re.escape(separator) + ' +"', text):
        yield (
            "spaces between a separator and a quote are ignored",
            _read_by_rules(lines, separator, skipped, skipinitialspace=True),
        )
    if '\\"' in text:
        doubled = list(io.StringIO(_BACKSLASH_QUOTE.sub(r'\1""', text), newline=""))
        yield r"\" is read as a quote inside a cell", _read_by_rules(doubled, separator, skipped)
    if by_rules.fault:
        yield (
            "quotes are read as ordinary characters",
            _read_quotes_as_letters(lines, separator, skipped, swallowed=by_rules.swallowed),
        )


def _read_by_rules(lines: list[str], separator: str, skipped: int, **form: Any) -> _Reading:
    """The records by the rules of CSV, up to the first error."""
    reader = csv.reader(lines[skipped:], delimiter=separator, strict=True, **form)
    records: list[_Record] = []
    first = skipped + 1
    try:
        for cells in reader:
            last = skipped + reader.line_num
            if cells:
                records.append(_Record(cells, first, last))
            first = last + 1
    except csv.Error as error:
        last = skipped + reader.line_num
        if "unexpected end" in str(error):
            return _Reading(records, f"a quote in the row at line {first} that is never closed")
        if "expected after" in str(error):
            where = f" in line {last}" if last > first else ""
            return _Reading(
                records, f"a quote that opens in the row at line {first} and closes in the middle of a cell{where}"
            )
        return _Reading(records, f"line {last}: {error}")
    return _check_swallowed(records, lines, separator)


def _check_swallowed(records: list[_Record], lines: list[str], separator: str) -> _Reading:
    """A reading of these records, with a fault if a quoted cell seems to have swallowed rows."""
    width, ragged = _Reading(records).width, _ragged(records)
    spaced_column = _BEFORE_QUOTE.search("".join(lines[:100])) and _find_quoted_column(records)
    if spaced_column:
        return _Reading(records, f"a space before each quote of {spaced_column}", ragged)
    if width > 1:
        is_row = None
        for record in records[1:]:
            if record.last > record.first:
                is_row = is_row or _RowTest(records)
                inside = lines[record.first - 1 : record.last]
                free = {position for position, cell in enumerate(record.cells) if "\n" in cell or "\r" in cell}
                free |= set(range(width)) if separator == "\t" else set()  # prose has no tabs
                row_count = sum(is_row(line.rstrip("\r\n").split(separator), free) for line in inside)
                if row_count >= 2 and 2 * row_count > len(inside):
                    span = f"a quote that opens in line {record.first} and closes in line {record.last}"
                    return _Reading(records, f"{span}, around {row_count} lines that look like rows", ragged, row_count)
    return _Reading(records, "", ragged)


def _ragged(records: Sequence[_Record]) -> list[int]:
    """The numbers of rows that do not fit the header."""
    return [n for n, record in enumerate(records[1:], 1) if not _fits(record.cells, records[0].cells)]


def _find_quoted_column(records: Sequence[_Record]) -> str:
    """A column whose cells are all quoted after a space, which CSV reads as part of the text; empty if none."""
    for position, name in enumerate(records[0].cells if len(records) > 1 else []):
        cells = [record.cells[position] for record in records[1:] if len(record.cells) > position]
        if cells and all(cell.startswith(" ") and cell.lstrip(" ").startswith('"') for cell in cells):
            return name.strip() or f"column {position + 1}"
    return ""


class _RowTest:
    """Tells whether the cells of a line look like a row of this table. Learns this from its rows of one line.

    In prose, what follows a comma is not one of a few labels, and begins with a space.
    """

    def __init__(self, records: Sequence[_Record]) -> None:
        self.width = len(records[0].cells)
        rows = [record.cells for record in records[1:] if record.first == record.last]
        rows = [cells for cells in rows if len(cells) == self.width]
        self.values = [{cells[position] for cells in rows} for position in range(self.width)]
        self.few_values = [
            len(rows) > 3 and 2 * len(values) <= len(rows) and _are_short(values) for values in self.values
        ]
        self.numeric = [bool(values) and all(_is_float(value) for value in values) for values in self.values]

    def __call__(self, cells: Sequence[str], free: Container[int] = ()) -> bool:
        """Whether each cell fits its column; cells at the places `free`, or with a quote, may be anything."""
        has_few_values = self.has_few_values(free)
        return len(cells) == self.width and all(
            position in free or '"' in cell or self._cell_fits(position, cell, has_few_values)
            for position, cell in enumerate(cells)
        )

    def has_few_values(self, free: Container[int] = ()) -> bool:
        """Whether the table has a column of a few labels, which tells rows from prose."""
        return any(few_values and position not in free for position, few_values in enumerate(self.few_values))

    def _cell_fits(self, position: int, cell: str, has_few_values: bool) -> bool:
        if self.few_values[position]:
            return cell in self.values[position]
        if self.numeric[position]:
            return _is_float(cell)
        return has_few_values or (cell != "" and not (position and cell[0].isspace()))


def _are_short(values: Iterable[str]) -> bool:
    return all(len(value) <= LABEL_MAX_LENGTH for value in values)


def _is_float(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _read_quotes_as_letters(lines: list[str], separator: str, skipped: int, *, swallowed: int) -> _Reading:
    """Reads each line as a row and quotes as ordinary characters.

    Has a fault if quotes seem to be meant as quotes: a whole cell is quoted, a line with a quote is unlike the other
    rows, or all quotes close and nothing tells rows from prose.
    """
    reader = csv.reader(lines[skipped:], delimiter=separator, quoting=csv.QUOTE_NONE)
    records = [_Record(cells, number, number) for number, cells in enumerate(reader, skipped + 1) if cells]
    header = records[0].cells
    is_row = _RowTest([records[0], *(record for record in records if not any('"' in cell for cell in record.cells))])
    unsure = swallowed and separator != "\t" and (swallowed < MIN_ROWS_IN_CELL or not is_row.has_few_values())
    if len(header) < 2 or any('"' in name for name in header) or unsure:
        return _Reading(records, "quotes are meant as quotes")
    for record in records:
        quoted = any(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in record.cells)
        if quoted or (any(cell.startswith('"') for cell in record.cells) and not is_row(record.cells)):
            return _Reading(records, "quotes are meant as quotes")
    return _Reading(records, "", _ragged(records))


def _invalid_csv(source: str, fault: str) -> DataError:
    return DataError(
        f"{source} is not valid CSV",
        got=fault,
        fix='correct its quotes: write one inside a quoted cell as ""; or save it as .jsonl',
        gotcha="csv-quotes",
    )
