"""Runs the command line in a process of its own that starts in no time: torch is imported once, and then forked.

Knows nothing of what is asserted of it.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hatrack.cli.main import main

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["hatrack.training.train", "tests.reliability.child"])


class Child:
    """`hatrack ARGUMENTS` in a child, its standard error in a file; `prepare(*given)` is called there first."""

    def __init__(
        self,
        arguments: Sequence[object],
        said: Path,
        prepare: Callable[..., None] | None = None,
        given: tuple[object, ...] = (),
        *,
        terminal: str | None = None,
    ) -> None:
        self._said = said
        self.sent: list[int] = []
        said.touch()
        words = [str(argument) for argument in arguments]
        self.process = FORKS.Process(
            target=_hatrack, args=(words, str(said), dict(os.environ), prepare, given, terminal)
        )
        self.process.start()

    @property
    def said(self) -> str:
        """Everything on its standard error so far."""
        return self._said.read_text(errors="replace")

    def send(self, number: int) -> None:
        """Sends it a signal."""
        assert self.process.pid
        os.kill(self.process.pid, number)
        self.sent.append(number)

    def end(self) -> int:
        """Waits for its exit code; that of a killed one is minus the signal's number."""
        self.process.join(60)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            raise AssertionError(f"it hangs: {self.said}")
        return code


def _hatrack(
    words: list[str],
    said: str,
    environment: dict[str, str],
    prepare: Callable[..., None] | None,
    given: tuple[object, ...],
    terminal: str | None,
) -> None:
    os.environ.update(environment)
    if terminal:
        os.setsid()
        os.dup2(os.open(terminal, os.O_RDWR), 1)  # the first terminal a session opens is its own
    else:
        os.dup2(os.open(said, os.O_WRONLY | os.O_APPEND), 1)
    os.dup2(1, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    sys.argv = ["hatrack", *words]
    if prepare:
        prepare(*given)
    main()
