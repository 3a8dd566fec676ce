"""Reads a file's text: decompresses it and finds its encoding.

Reports an encoding other than UTF-8: UTF-16, UTF-32 or Windows-1252. Knows nothing of rows.
"""

import bz2
import gzip
import io
import json
import re
import zlib
from pathlib import Path

from hatrack.console import say_once
from hatrack.errors import DataError
from hatrack.file_kind import BZIP2, GZIP, PARQUET, START_BYTES, FileKind, identify

COMPRESSED = {".gz": GZIP, ".bz2": BZIP2}
"""The ending of a file's name -> its kind."""

NEVER_TOGETHER = [("ðþÐÞ", "çüÇÜ"), ("øØ", "ìùýž")]
"""Letters that no language has together: Turkish and Czech text look so if read as Windows-1252."""

_SURROGATE = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]")
"""A lone surrogate, which some programs write as UTF-8."""
_ACCENTS_ONLY = re.compile("[À-ÖØ-öø-ÿŠšŒœŽžŸƒ]{3}|(?<![A-Za-zÀ-ÖØ-öø-ÿ])[À-ÖØ-öø-ÿ]{2}(?![A-Za-zÀ-ÖØ-öø-ÿ])")
_CAPITAL_INSIDE = re.compile("[a-zß-öø-ÿ][À-ÖØ-ÞŠŒŽŸ]")
_SIGN_INSIDE = re.compile("[A-Za-zÀ-ÖØ-öø-ÿ][¡-©«¬®-³µ¶¸¹»-¿×÷€‚ƒ„†‡ˆ‰‹“”•˜™›][A-Za-zÀ-ÖØ-öø-ÿ]")
"""Rare in Western European text: accented letters in a row, a capital or a sign inside a word."""


def read_text(source: str, path: Path) -> str:
    """The text of a file, decompressed if its name ends in .gz or .bz2; line ends stay as they are.

    Raises DataError if it cannot be read or decoded, or is not text but a Git LFS pointer, a web page, an archive...
    """
    ending = path.suffix.lower() if path.suffix.lower() in COMPRESSED else ""
    try:
        content = path.read_bytes()
        found = identify(io.BytesIO(content))
        if ending and content and (found is None or found.kind != COMPRESSED[ending]):
            plain = FileKind(
                "plain text, not what its name says", f"no bytes {COMPRESSED[ending]}", f"name it {path.stem}"
            )
            raise _not_text(source, path, found or plain)
        if ending:
            content = (gzip if ending == ".gz" else bz2).decompress(content)
            found = identify(io.BytesIO(content))
            if found and found.kind in COMPRESSED.values():
                raise DataError(
                    f"{source} is compressed twice", got=found.got, fix=f"decompress it once and name it {path.name}"
                )
    except (OSError, EOFError, ValueError, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{source} cannot be read", got=str(error), fix="check the file and its permissions") from error
    if found:
        raise _not_text(source, path, found)
    text = decode(source, content)
    found = identify(io.BytesIO(text[:START_BYTES].encode("utf-8", "replace")))  # a pointer or a page in UTF-16
    if found:
        raise _not_text(source, path, found)
    return text


def decode(source: str, content: bytes) -> str:
    """Bytes as text, without a byte order mark. `source` is their name in messages.

    Raises DataError if they are not UTF-8, UTF-16, UTF-32 or plausible Windows-1252, or hold NUL bytes.
    """
    encoding = json.detect_encoding(content)  # by the byte order mark, else by the places of NUL bytes
    name = encoding.upper().removesuffix("-SIG").removesuffix("-LE").removesuffix("-BE")
    marked = content.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"))
    try:
        text = content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        if name == "UTF-8":
            return _windows_1252(source, content, error)
        raise _undecodable(source, f"a mark of {name}, and bytes that are not" if marked else "NUL bytes") from error
    if name != "UTF-8" and not marked and ("\0" in text or not re.search(r"[\r\n]|^\s*[{\[]", text)):
        # UTF-8 with a stray NUL near its beginning looks like UTF-16, too, but then has no line ends
        raise _undecodable(source, "NUL bytes")
    if "\0" in text:
        raise _undecodable(source, f"NUL bytes, the first in line {_line_number(text, text.index(chr(0)))}")
    if name != "UTF-8":
        say_once(f"{source}: read as {name}")
    return text


def _windows_1252(source: str, content: bytes, error: UnicodeDecodeError) -> str:
    """The text of Excel's CSV on Windows in Western Europe, if nothing else is plausible."""
    line = content[: error.start].count(b"\n") + 1
    stray = _undecodable(source, f"a stray byte in line {line}")
    halves = content.decode("utf-8", "replace")
    damaged = halves.count("\ufffd")
    if 4 * (sum(letter > "\x7f" for letter in halves) - damaged) >= damaged:
        raise stray from error  # mostly UTF-8 with some bytes lost
    try:
        text = content.decode("cp1252")
    except UnicodeDecodeError:
        raise stray from error
    mixed = any(re.search(f"[{one}]", text) and re.search(f"[{other}]", text) for one, other in NEVER_TOGETHER)
    odd = sum(len(pattern.findall(text)) for pattern in (_ACCENTS_ONLY, _CAPITAL_INSIDE, _SIGN_INSIDE))
    if (
        mixed
        or 20 * odd > damaged
        or _SURROGATE.search(content)
        or re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", text)
    ):
        raise stray from error
    word = re.search(r"[^\s,;\"]*[^\x00-\x7f][^\s,;\"]*", text)
    shown = f": {word[0][:30]} in line {_line_number(text, word.start())}" if word else ""
    say_once(f"{source}: not UTF-8, read as Windows-1252{shown}; if that is wrong, save it as UTF-8")
    return text


def _undecodable(source: str, got: str) -> DataError:
    return DataError(f"{source} is not UTF-8 text", got=got, fix="save it as UTF-8", gotcha="text-encoding")


def _not_text(source: str, path: Path, found: FileKind) -> DataError:
    """The error for a file of another kind than its name says, with the right name if there is one."""
    fix = found.fix
    if found.kind in COMPRESSED.values():
        plain = path.stem if path.suffix.lower() in COMPRESSED else path.name
        fix = f"name it {plain}.{'gz' if found.kind == GZIP else 'bz2'}"
    elif found.kind == PARQUET:
        fix = f"name it {path.name.partition('.')[0]}.parquet"
    return DataError(f"{source} is {found.kind}", got=found.got, fix=fix, gotcha="another-kind-of-file")


def _line_number(text: str, place: int) -> int:
    """The line that holds a place in the text, from 1."""
    return len(re.findall(r"\r\n|\r|\n", text[:place])) + 1
