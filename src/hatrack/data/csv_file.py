"""CSV and its kin -> rows: which mark separates the cells, and what its quotes mean.

A quote that opens by mistake swallows rows without a word. So a file is read as RFC 4180 has it only where that reading
is whole; else in the one other way that makes rows of every line, which is said, or not at all. Knows nothing of
encodings, tasks or labels.
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

SURE = 3
"""Lines that end in a known label each: so many in one cell are rows, not prose."""
LONGEST_LABEL = 40
"""Letters of a cell that may be one of a few labels."""

_BEFORE_QUOTE = re.compile(r"\S +\"")
_SEP_LINE = re.compile(r'"?sep=([^\w"\\\r\n])"?(\r\n|\r|\n|$)', re.IGNORECASE)
_BACKSLASH_QUOTE = re.compile(r'(?<!\\)((?:\\\\)*)\\"')


class _Record(NamedTuple):
    """The cells of one row or of the header, and its first and last line in the file."""

    cells: list[str]
    first: int
    last: int


@dataclass(frozen=True)
class _Reading:
    """One way to read a file: its records, and in words what is wrong with that way.

    `ragged`: rows that have another number of cells than the header. `swallows`: how
    many lines that look like rows are in one cell, though all quotes close.
    """

    records: list[_Record]
    fault: str = ""
    ragged: list[int] = field(default_factory=list)
    swallows: int = 0

    @property
    def width(self) -> int:
        """Cells of the header."""
        return len(self.records[0].cells) if self.records else 0


def read_csv(source: str, text: str, separator: str) -> Rows:
    """The rows of a table whose first line names its columns.

    `separator` is what the file's name promises; another one is taken where the header has only that and every row
    fits, or where a first line `sep=;` names it. Raises DataError where no separator or no meaning of the quotes makes
    sense of all lines, with the line where a quote opens.
    """
    _refuse_json(source, text)
    named = _SEP_LINE.match(text)
    if named:
        separator = named[1]
        say_once(f"{source}: the first line, {named[0].strip()!r}, names the separator and is no row")
    lines = list(io.StringIO(text, newline=""))
    skipped = 1 if named else 0
    if not any(line.strip() for line in lines[skipped:]):
        raise DataError(f"{source} is empty", got="no header line", fix="the first line must name the columns")
    separator = _separator(source, lines, separator, skipped)
    reading = _whole_reading(source, lines, separator, skipped)
    if reading.fault:
        raise _misquoted(source, reading.fault)
    header, *records = reading.records
    return _table(source, header.cells, [record.cells for record in records])


def _table(source: str, header: list[str], lines: list[list[str]]) -> Rows:
    rows, problems = [], []
    for number, cells in enumerate(lines, 1):
        if cells == header:
            problems.append((number, "the header again, as where two files were joined"))
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
    """Whether a row has a cell for each column up to the last that has a name, and no more but empty ones."""
    if len(cells) == len(header):
        return True
    named = max((place for place, name in enumerate(header, 1) if name.strip()), default=len(header))
    return len(cells) >= named and not any(cells[len(header) :])


def _refuse_json(source: str, text: str) -> None:
    start = text.lstrip()
    if start.startswith(("{", "[")):
        try:
            found, end = json.JSONDecoder().raw_decode(start)
        except (ValueError, RecursionError):
            return
        if isinstance(found, dict) or (isinstance(found, list) and start[end:].strip() == ""):
            raise DataError(
                f"{source} holds JSON, not CSV",
                got=f"it begins with {start[:30]!r}",
                fix="name it .jsonl" if isinstance(found, dict) else "name it .json",
                gotcha="json-layout",
            )


def _separator(source: str, lines: list[str], promised: str, skipped: int) -> str:
    """The separator of a file: the promised one, or another that alone stands in the header and fits every row.

    Raises DataError where another one stands there and does not: every line would be taken for one long text.
    """
    header = next(line for line in lines[skipped:] if line.strip()).rstrip("\r\n")
    if promised in header:
        return promised
    others = {mark: _whole_reading(source, lines, mark, skipped, aloud=False) for mark in SEPARATORS if mark in header}
    others = {mark: reading for mark, reading in others.items() if reading.width > 1}
    for mark, reading in others.items():
        if not reading.fault and not reading.ragged:
            say_once(f"{source}: read with {SEPARATORS[mark]} between the cells, as its header has them")
            return mark
    if others:
        raise DataError(
            f"{source} is not separated by {SEPARATORS.get(promised, repr(promised))}",
            got=f"the header {header!r}, and rows that do not fit it",
            fix=f"save it with {SEPARATORS.get(promised, repr(promised))} between the cells",
        )
    return promised


def _whole_reading(source: str, lines: list[str], separator: str, skipped: int, *, aloud: bool = True) -> _Reading:
    """The reading by the rules of CSV, or where that has a fault another one that has none, and says so.

    Where none is without fault it is the first one, with its fault.
    """
    plain = _read(lines, separator, skipped)
    if not plain.fault and not plain.ragged:
        return plain
    for words, reading in _others(lines, separator, skipped, plain):
        if not reading.fault and not reading.ragged:
            if aloud:
                reason = plain.fault or f"another number of cells in row {plain.ragged[0]}"
                say_once(f"{source}: {words} (by the rules of CSV there is {reason})")
            return reading
    return plain


def _others(lines: list[str], separator: str, skipped: int, plain: _Reading) -> Iterator[tuple[str, _Reading]]:
    """What else quotes may mean, the likeliest first, each in words."""
    text = "".join(lines)
    if re.search(re.escape(separator) + ' +"', text):
        yield (
            "spaces between a separator and a quote are passed over",
            _read(lines, separator, skipped, skipinitialspace=True),
        )
    if '\\"' in text:
        doubled = list(io.StringIO(_BACKSLASH_QUOTE.sub(r'\1""', text), newline=""))
        yield r"\" is read as a quote inside a cell", _read(doubled, separator, skipped)
    if plain.fault:
        yield (
            "quotes are read as letters, as they stand",
            _as_letters(lines, separator, skipped, swallows=plain.swallows),
        )


def _read(lines: list[str], separator: str, skipped: int, **form: Any) -> _Reading:
    """All records by the rules of CSV, as far as they go."""
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
            return _Reading(records, f"a quote that opens in the row at line {first} and closes amid a cell{where}")
        return _Reading(records, f"line {last}: {error}")
    return _judged(records, lines, separator)


def _judged(records: list[_Record], lines: list[str], separator: str) -> _Reading:
    """The reading of these records, with the fault of one that swallowed others."""
    width, ragged = _Reading(records).width, _ragged(records)
    spaced = _BEFORE_QUOTE.search("".join(lines[:100])) and _column_in_quotes(records)
    if spaced:
        return _Reading(records, f"a space before each quote of {spaced}", ragged)
    if width > 1:
        is_row = None
        for record in records[1:]:
            if record.last > record.first:
                is_row = is_row or _RowTest(records)
                inside = lines[record.first - 1 : record.last]
                free = {place for place, cell in enumerate(record.cells) if "\n" in cell or "\r" in cell}
                free |= set(range(width)) if separator == "\t" else set()  # prose has no tabs
                whole = sum(is_row(line.rstrip("\r\n").split(separator), free) for line in inside)
                if whole >= 2 and 2 * whole > len(inside):
                    span = f"a quote that opens in line {record.first} and closes in line {record.last}"
                    return _Reading(records, f"{span}, around {whole} lines that look like rows", ragged, whole)
    return _Reading(records, "", ragged)


def _ragged(records: Sequence[_Record]) -> list[int]:
    """The numbers of the rows that do not fit the header."""
    return [n for n, record in enumerate(records[1:], 1) if not _fits(record.cells, records[0].cells)]


def _column_in_quotes(records: Sequence[_Record]) -> str:
    """The name of a column whose every cell is in quotes after a space, which CSV takes for letters; empty if none."""
    for place, name in enumerate(records[0].cells if len(records) > 1 else []):
        cells = [record.cells[place] for record in records[1:] if len(record.cells) > place]
        if cells and all(cell.startswith(" ") and cell.lstrip(" ").startswith('"') for cell in cells):
            return name.strip() or f"column {place + 1}"
    return ""


class _RowTest:
    """Whether the cells of a line look like a row of this table, by the rows that stand on one line each.

    What follows a comma in prose is none of the few labels, and has a space before it.
    """

    def __init__(self, records: Sequence[_Record]) -> None:
        self.width = len(records[0].cells)
        known = [record.cells for record in records[1:] if record.first == record.last]
        known = [cells for cells in known if len(cells) == self.width]
        self.values = [{cells[place] for cells in known} for place in range(self.width)]
        self.few = [len(known) > 3 and 2 * len(values) <= len(known) and _short(values) for values in self.values]
        self.numeric = [bool(values) and all(_is_number(value) for value in values) for values in self.values]

    def __call__(self, cells: Sequence[str], free: Container[int] = ()) -> bool:
        """Whether each cell fits its column; one in a place of `free`, or with a quote in it, may be anything."""
        tells = self.tells(free)
        return len(cells) == self.width and all(
            place in free or '"' in cell or self._fits(place, cell, tells) for place, cell in enumerate(cells)
        )

    def tells(self, free: Container[int] = ()) -> bool:
        """Whether the table has a column of a few labels, by which rows are known from prose."""
        return any(few and place not in free for place, few in enumerate(self.few))

    def _fits(self, place: int, cell: str, tells: bool) -> bool:
        if self.few[place]:
            return cell in self.values[place]
        if self.numeric[place]:
            return _is_number(cell)
        return tells or (cell != "" and not (place and cell[0].isspace()))


def _short(values: Iterable[str]) -> bool:
    return all(len(value) <= LONGEST_LABEL for value in values)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _as_letters(lines: list[str], separator: str, skipped: int, *, swallows: int) -> _Reading:
    """Each line a row and each quote a letter; with a fault where quotes were meant as quotes: a cell is in quotes as a
    whole, a line with a quote is unlike the other rows, or all quotes close and nothing else tells rows from prose."""
    reader = csv.reader(lines[skipped:], delimiter=separator, quoting=csv.QUOTE_NONE)
    records = [_Record(cells, number, number) for number, cells in enumerate(reader, skipped + 1) if cells]
    header = records[0].cells
    is_row = _RowTest([records[0], *(record for record in records if not any('"' in cell for cell in record.cells))])
    unsure = swallows and separator != "\t" and (swallows < SURE or not is_row.tells())
    if len(header) < 2 or any('"' in name for name in header) or unsure:
        return _Reading(records, "quotes are meant as quotes")
    for record in records:
        quoted = any(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in record.cells)
        if quoted or (any(cell.startswith('"') for cell in record.cells) and not is_row(record.cells)):
            return _Reading(records, "quotes are meant as quotes")
    return _Reading(records, "", _ragged(records))


def _misquoted(source: str, fault: str) -> DataError:
    return DataError(
        f"{source} is not valid CSV",
        got=fault,
        fix='mend its quotes: one inside a quoted cell is written ""; or save it as .jsonl',
        gotcha="csv-quotes",
    )
