"""What may not happen while a mutated input is tried: taking long, and writing outside its folder."""

import contextlib
import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

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

outcomes: Counter[tuple[str, str]] = Counter()
"""How often what was mutated (a few words) was "taken" or "refused"."""

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)

PIECE = st.binary(max_size=12) | st.text("\"',[]{}:;#\n\t -a0\u00e9", max_size=6).map(str.encode)

_allowed: list[str] = []
_outside: list[str] = []


def mutated(data: st.DataObject, content: bytes, within: int) -> bytes:
    """`content` with a few pieces put in, taken out or cut off, mostly among its first `within` bytes."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, min(len(changed), within) - 1) | st.integers(0, len(changed) - 1))
        changed[place : place + data.draw(st.integers(0, 8))] = data.draw(PIECE)
        if data.draw(st.integers(0, 9)) == 0:
            changed = changed[:place]
        changed = changed or bytearray(b"x")
    return bytes(changed)


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Fails where the block takes too long, or writes, makes, moves or removes anything outside `folder`."""

    def late(number: int, frame: Any) -> None:
        where = "".join(traceback.format_stack(frame)[-6:])
        print(f"it hangs: {signal.Signals(number).name}\n{where}", file=sys.stderr)
        pytest.fail("it hangs")  # no Exception: code that catches all of them lets it pass

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
