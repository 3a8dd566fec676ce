"""What hatrack says while it works: on standard error, so that standard output stays the answer.

`HATRACK_QUIET=1` silences it. Knows nothing of what is said.
"""

import contextlib
import functools
import os
import sys
from typing import IO, Any, cast

from rich.console import Console

from hatrack.errors import in_words


class StandardError:
    """Standard error for as long as somebody reads it: work goes on when its terminal or pipe is closed."""

    def write(self, text: str) -> int:
        """Writes, or from the first failure on lets everything go to nowhere."""
        try:
            return sys.stderr.write(text)
        except OSError:
            self._let_go()
            return len(text)

    def flush(self) -> None:
        """As `write`."""
        try:
            sys.stderr.flush()
        except OSError:
            self._let_go()

    def _let_go(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


@functools.cache
def console() -> Console:
    """The one console of this process; progress bars and lines share it, so they never overwrite each other."""
    return Console(file=cast(IO[str], StandardError()), highlight=False, emoji=False, soft_wrap=True)


def say(line: str) -> None:
    """Says one line, options in the reader's words. Markup is not interpreted: file names may hold any character."""
    if not os.environ.get("HATRACK_QUIET"):
        console().print(in_words(line), markup=False)


def say_in_signal(line: str) -> None:
    """Says one line from a signal handler, which may have stopped us inside `say`: straight out, without any lock."""
    erase = "\r\x1b[2K" if console().is_terminal else ""  # a progress bar is drawn anew below
    if not os.environ.get("HATRACK_QUIET"):
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), f"{erase}{line}\n".encode())


@functools.cache
def say_once(line: str) -> None:
    """Says a line the first time it is asked to: for what holds for a whole run, however many rows it holds for."""
    say(line)


def size(count: float) -> str:
    """Bytes for people.

    >>> size(3_221_225_472)
    '3.0 GiB'
    """
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def counted(rows: int) -> str:
    """How many rows, in words.

    >>> counted(1), counted(1200)
    ('a row', '1,200 rows')
    """
    return f"{rows:,} rows" if rows != 1 else "a row"
