"""What a check found, in the three parts of every complaint: what, got, fix. Knows no gotcha."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from hatrack.errors import MAX_COMPLAINTS, DataError, HatrackError

Known = TypeVar("Known")


@dataclass(frozen=True)
class Finding:
    """One gotcha, found. `gotcha` is its heading in docs/gotchas.md; `refused` says that hatrack would not go on."""

    gotcha: str
    what: str
    got: str
    fix: str
    refused: bool = False

    def __str__(self) -> str:
        """As it is said: what, got, fix, and the heading to read about it.

        >>> str(Finding("alpha-far-from-2r", "alpha is far from 2r", "alpha 1, r 64", "leave --alpha out"))
        'alpha is far from 2r; got alpha 1, r 64; fix: leave --alpha out [alpha-far-from-2r]'
        """
        return f"{HatrackError(self.what, got=self.got or None, fix=self.fix or None)} [{self.gotcha}]"


def refusal(gotcha: str, error: HatrackError) -> Finding:
    """What another room refuses, as a finding: under the error's own heading, or else under `gotcha`."""
    complaints = error.complaints if isinstance(error, DataError) and len(error.complaints) > 1 else []
    more = [f"... and {len(complaints) - MAX_COMPLAINTS:,} more"] if len(complaints) > MAX_COMPLAINTS else []
    what = "\n  ".join([error.what, *complaints[:MAX_COMPLAINTS], *more])
    got = "" if error.got is None else str(error.got)
    return Finding(error.gotcha or gotcha, what, got, error.fix or "", refused=True)


class FindingCollector:
    """Goes from fact to fact: what one step cannot find is noted, and the steps that need it are passed over."""

    def __init__(self) -> None:
        self.found: list[Finding] = []

    def attempt(self, gotcha: str, find: Callable[..., Known], *needed: Any, **options: Any) -> Known | None:
        """`find(*needed, **options)`; None where it refuses, which is noted as `gotcha`, or where a fact it needs is
        None."""
        if any(fact is None for fact in needed):
            return None
        try:
            return find(*needed, **options)
        except HatrackError as error:
            self.found.append(refusal(gotcha, error))
            return None
