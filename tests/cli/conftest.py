"""Runs the command line inside the test's process, in an empty folder."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hatrack.cli.main import main


@dataclass(frozen=True)
class Ran:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be exactly one JSON object."""
        return json.loads(self.out)

    @property
    def complaint(self) -> str:
        """The line that begins with hatrack's name."""
        lines = [line for line in self.err.splitlines() if line.startswith("hatrack: ")]
        assert len(lines) == 1, self.err
        return lines[0]


@pytest.fixture
def hatrack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """`hatrack("train", "--r", 0)`: runs a command in an empty folder."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv("COLUMNS", raising=False)  # readline sets it

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["hatrack", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        code = stopped.value.code
        assert isinstance(code, int)
        return Ran(code, printed.out, printed.err)

    return run
