"""A check's finding, in the three parts of every message: what, got, fix."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from hatrack.errors import MAX_COMPLAINTS, DataError, HatrackError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Finding:
    """A gotcha that was found. `gotcha`: its heading in docs/gotchas.md. `refused`: whether hatrack refuses the run."""

    gotcha: str
    what: str
    got: str
    fix: str
    refused: bool = False

    def __str__(self) -> str:
        """The message: what, got, fix, and the heading in docs/gotchas.md.

        >>> str(Finding("alpha-far-from-2r", "alpha is far from 2r", "alpha 1, r 64", "leave --alpha out"))
        'alpha is far from 2r; got alpha 1, r 64; fix: leave --alpha out [alpha-far-from-2r]'
        """
        return f"{HatrackError(self.what, got=self.got or None, fix=self.fix or None)} [{self.gotcha}]"


def refusal(gotcha: str, error: HatrackError) -> Finding:
    """Turns an error into a finding, under the error's own heading or else `gotcha`."""
    complaints = error.complaints if isinstance(error, DataError) and len(error.complaints) > 1 else []
    more = [f"... and {len(complaints) - MAX_COMPLAINTS:,} more"] if len(complaints) > MAX_COMPLAINTS else []
    what = "\n  ".join([error.what, *complaints[:MAX_COMPLAINTS], *more])
    got = "" if error.got is None else str(error.got)
    return Finding(error.gotcha or gotcha, what, got, error.fix or "", refused=True)


class FindingCollector:
    """Calls functions and collects a finding from each one that raises. Skips functions that need the result of a
    function that raised."""

    def __init__(self) -> None:
        self.found: list[Finding] = []

    def attempt(self, gotcha: str, find: Callable[..., Result], *needed: Any, **options: Any) -> Result | None:
        """Returns `find(*needed, **options)`, or None if one of `needed` is None or if the call raises. The error then
        becomes a finding named `gotcha`."""
        if any(value is None for value in needed):
            return None
        try:
            return find(*needed, **options)
        except HatrackError as error:
            self.found.append(refusal(gotcha, error))
            return None
