"""What hatrack says while it works: on standard error, so that standard output stays the answer.

`HATRACK_QUIET=1` silences it. Knows nothing of what is said.
"""

import functools
import os

from rich.console import Console


@functools.cache
def console() -> Console:
    """The one console of this process; progress bars and lines share it, so they never overwrite each other."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """Says one line. Markup is not interpreted: file names may hold any character."""
    if not os.environ.get("HATRACK_QUIET"):
        console().print(line, markup=False)


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
