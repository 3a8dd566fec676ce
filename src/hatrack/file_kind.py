"""Identifies a file by its first bytes: a Git LFS pointer, a web page, an archive, a spreadsheet.

Knows nothing of what is inside it, and no torch.
"""

import contextlib
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from hatrack.errors import HatrackError, join_first

START_BYTES = 1024
"""Bytes that are read to identify a file; for a zip archive, also its list of names."""

LARGEST_HEADER = 100 * 2**20
"""The largest safetensors header, in bytes."""

GZIP, BZIP2, PARQUET = "compressed with gzip", "compressed with bzip2", "a Parquet file"
SPREADSHEET, SAFETENSORS, GGUF = "a spreadsheet", "a safetensors file", "a GGUF file"
LFS, PAGE, PICKLE = "a Git LFS pointer", "a web page (HTML or XML)", "a pickle"
ZIP, DAMAGED_ZIP = "a zip archive", "a damaged zip archive"

STARTS = {
    b"\x1f\x8b": GZIP,
    b"BZh": BZIP2,
    b"\xfd7zXZ\0": "compressed with xz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"PK\x03\x04": ZIP,
    b"PK\x05\x06": ZIP,
    b"PAR1": PARQUET,
    b"ARROW1\0\0": "an Arrow file",
    b"SQLite format 3\0": "an SQLite database",
    b"\x89HDF\r\n": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": SPREADSHEET,  # Excel before 2007
    b"GGUF": GGUF,
    b"%PDF-": "a PDF",
    b"{\\rtf": "a text document (RTF)",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
}
INSIDE_ZIP = {
    r"xl/|content\.xml$": SPREADSHEET,
    r"word/": "a Word document",
    r"(.*/)?data\.pkl$": PICKLE,  # as torch.save writes it
    r".*\.npy$": "a NumPy archive",
}
"""Pattern of the names in a zip archive -> what the archive is."""

FIXES = {
    LFS: "run git lfs pull in its folder, which fetches the file itself",
    PAGE: "download the file again: a site sent this page in its place",
    SPREADSHEET: "save it as CSV (UTF-8) in the program that made it",
    "a Word document": "save it as CSV or plain text in the program that made it",
    SAFETENSORS: "rename it to end in .safetensors, or give the right file",
    GGUF: "rename it to end in .gguf, or give the right file",
    PICKLE: "get it as safetensors, or give the right file",
    "a PDF": "give its text as CSV or JSON Lines",
}
ARCHIVE_FIX, OTHER_FIX = "unpack it, and give the file inside", "give the right file"

_TEXT = rb"(\xef\xbb\xbf)?\s*"
PATTERNS = {
    LFS: re.compile(_TEXT + rb"version https://(git-lfs|hawser)\.github\.com/"),
    PAGE: re.compile(
        _TEXT + rb"(<!--.*?-->\s*)*<((!doctype|html|head|title|meta|script|body|\?xml|svg)\b|error>)",
        re.DOTALL | re.IGNORECASE,
    ),
    PICKLE: re.compile(rb"\x80[\x02-\x05][\x8a\x95}\](cq.K]"),
}
_ERROR = TypeVar("_ERROR", bound=HatrackError)


@dataclass(frozen=True)
class FileKind:
    """What a file is ("a zip archive"), the evidence, and what to do if another kind was expected."""

    kind: str
    got: str
    fix: str


def identify(file: BinaryIO) -> FileKind | None:
    """Identifies an open file; None for plain text and other files without typical first bytes.

    Reads from the current position, and moves it.
    """
    start = file.read(START_BYTES)
    kind = next((kind for mark, kind in STARTS.items() if start.startswith(mark)), "")
    kind = kind or next((kind for kind, pattern in PATTERNS.items() if pattern.match(start)), "")
    got = f"it begins with {start[:4].hex(' ')}"
    if not kind and start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= LARGEST_HEADER:
        kind = SAFETENSORS
    if kind == ZIP:
        kind, got = _identify_zip(file)
    elif kind in (LFS, PAGE):
        first = start.decode("utf-8-sig", "replace").strip().splitlines()[0]
        got = f"it begins with {first[:50]!r}"
    if not kind:
        return None
    packed = "archive" in kind or kind.startswith("compressed")
    return FileKind(kind, got, FIXES.get(kind, ARCHIVE_FIX if packed else OTHER_FIX))


def wrong_kind_error(path: Path, wanted: str, error: type[_ERROR]) -> _ERROR | None:
    """The error for a file that is not of the kind `wanted` ("a safetensors file"); None if its first bytes do not
    show what it is, or if it cannot be read."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        found = identify(file)
        if found and found.kind != wanted and (found.kind, wanted) != (DAMAGED_ZIP, PICKLE):  # as torch.save makes
            what = f"{path} is {found.kind}, not {wanted}"
            return error(what, got=found.got, fix=found.fix, gotcha="another-kind-of-file")
    return None


def _identify_zip(file: BinaryIO) -> tuple[str, str]:
    """What a zip archive is, by the names in it, and the evidence."""
    names: list[str] = []
    with contextlib.suppress(zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        names = zipfile.ZipFile(file).namelist()
    kinds = (kind for pattern, kind in INSIDE_ZIP.items() if any(re.match(pattern, name) for name in names))
    shown = join_first(names, 3)
    return (next(kinds, ZIP), f"it holds {shown}") if names else (DAMAGED_ZIP, "no names in it can be read")
