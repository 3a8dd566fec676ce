"""Prints progress and notes on standard error: standard output is for results.

`HATRACK_QUIET=1` silences them.
"""

import contextlib
import functools
import os
import signal
import sys
from typing import IO, Any, cast

from rich.console import Console

from hatrack.errors import spell_options

ENDING_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that end a command, besides Ctrl-C. Windows has no SIGHUP."""


class SafeStderr:
    """Standard error that becomes /dev/null when its terminal or pipe is closed, so that a run goes on."""

    def write(self, text: str) -> int:
        """Writes `text` and returns its length, even if the reader is gone."""
        try:
            return sys.stderr.write(text)
        except OSError:
            self._discard_output()
            return len(text)

    def flush(self) -> None:
        """Flushes standard error."""
        try:
            sys.stderr.flush()
        except OSError:
            self._discard_output()

    def _discard_output(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


@functools.cache
def console() -> Console:
    """The console of this process. Progress bars and lines share it, so they do not overwrite each other."""
    return Console(file=cast(IO[str], SafeStderr()), highlight=False, emoji=False, soft_wrap=True)


def say(line: str) -> None:
    """Prints one line. Options in it are written as `OptionStyle` says; rich markup is not interpreted."""
    if not os.environ.get("HATRACK_QUIET"):
        console().print(spell_options(line), markup=False)


def say_in_signal(line: str) -> None:
    """Prints one line from a signal handler. It takes no lock: the signal may have interrupted `say`."""
    erase = "\r\x1b[2K" if console().is_terminal else ""  # the progress bar is redrawn below
    if not os.environ.get("HATRACK_QUIET"):
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), f"{erase}{line}\n".encode())


@functools.cache
def say_once(line: str) -> None:
    """Prints a line once per process."""
    say(line)


def format_size(count: float) -> str:
    """Formats a number of bytes.

    >>> format_size(3_221_225_472)
    '3.0 GiB'
    """
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def format_rows(rows: int) -> str:
    """Formats a number of rows.

    >>> format_rows(1), format_rows(1200)
    ('a row', '1,200 rows')
    """
    return f"{rows:,} rows" if rows != 1 else "a row"
