"""What may not happen while a mutated input is tried: taking long, and writing outside its folder."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings

MANY = settings(
    max_examples=int(os.environ.get("HATRACK_FUZZ", "40")),
    deadline=None,
    derandomize="HATRACK_FUZZ" not in os.environ,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # shrinking what waits for patterns takes minutes
    suppress_health_check=list(HealthCheck),
)
SECONDS, PATIENCE = 2.0, 20.0
"""An input hangs that takes more than so many seconds of this process's computing, or of the clock: a busy machine's
clock says little, and regular expressions, computed elsewhere, have 2 seconds by themselves."""

_allowed: list[str] = []
_outside: list[str] = []


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Fails where the block takes too long, or writes, makes, moves or removes anything outside `folder`."""

    def late(number: int, _: Any) -> None:
        raise TimeoutError(f"it hangs: {signal.Signals(number).name}")

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, PATIENCE))
    before = {number: signal.signal(number, late) for number, _, _ in timers}
    for _, timer, seconds in timers:
        signal.setitimer(timer, seconds)
    _allowed[:], _outside[:] = [str(folder)], []
    try:
        yield
    finally:
        for number, timer, _ in timers:
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])
        _allowed.clear()
    assert not _outside, _outside


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _allowed:
        return
    if event == "open":
        path, _, flags = arguments
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    else:
        path, writes = arguments[0] if arguments else "", event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
    if writes and not isinstance(path, int) and not os.fspath(path).startswith((*_allowed, "/dev/null")):
        _outside.append(f"{event} {path!r}")


sys.addaudithook(_audit)
