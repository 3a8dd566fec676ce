"""Reports all bad rows at once, with equal complaints grouped.

Does not know the rules that rows are checked by.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from hatrack.console import format_rows, say
from hatrack.data.row_values import BadRow
from hatrack.errors import DataError

SHOWN_SPANS = 8


class BadRows(DataError):
    """Rows that cannot be learned from. `bad`: each source and its bad rows; `total`: the number of all rows.

    `good_examples`: the `Examples` of the other rows; None if these are too few to train on.
    """

    good_examples: Any = None

    def __init__(
        self, bad: Sequence[tuple[str, Sequence[BadRow]]], total: int, fixes: Sequence[str] = (), gotcha: str = ""
    ) -> None:
        self.bad, self.total, self.fixes = bad, total, list(dict.fromkeys(fixes))
        count = sum(len(each) for _, each in bad)
        fix = self.fixes or ["correct them" if count > 1 else "correct it"]
        skip = [] if count >= total else [f"leave {'them' if count > 1 else 'it'} out with --bad-rows skip"]
        super().__init__(
            f"{format_rows(count)} cannot be learned from",
            fix=", or ".join([*fix, *skip]),
            gotcha=gotcha,
            complaints=[line for source, each in bad for line in group_complaints(source, each)],
        )


def join_errors(errors: Sequence[BadRows], total: int) -> BadRows:
    """Joins several errors into one; `total` is the number of all rows."""
    by_source: dict[str, list[BadRow]] = {}
    for error in errors:
        for source, each in error.bad:
            by_source.setdefault(source, []).extend(each)
    gotcha = next((error.gotcha for error in errors if error.gotcha), "")
    fixes = [fix for error in errors for fix in error.fixes or ["correct them"]]
    return BadRows(list(by_source.items()), total, fixes, gotcha)


def refuse_or_skip(error: BadRows, bad_rows: str) -> None:
    """Raises `error` if it has rows; with `bad_rows: skip` only says how many are left out."""
    count = sum(len(each) for _, each in error.bad)
    if bad_rows == "refuse" and count:
        raise error
    if count:
        say(f"{count:,} row{'s' * (count > 1)} left out, the first: {error.complaints[0]}")


def group_complaints(source: str, bad: Sequence[BadRow]) -> list[str]:
    """The complaints about a source in the order of its rows, with equal ones grouped.

    >>> bad = [BadRow(3, "empty", "text"), BadRow(4, "empty", "text"), BadRow(9, "empty", "text"), BadRow(5, "odd")]
    >>> group_complaints("f.csv", bad)
    ['f.csv rows 3-4, 9, column text: empty', 'f.csv row 5: odd']
    """
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for each in sorted(bad, key=lambda each: each.row):
        groups[each.column, each.reason].append(each.row)
    return [
        f"{source} {format_row_numbers(rows)}" + (f", column {column}" if column else "") + f": {reason}"
        for (column, reason), rows in groups.items()
    ]


def format_row_numbers(rows: Sequence[int]) -> str:
    """Row numbers in short form.

    >>> format_row_numbers([4]), format_row_numbers([1, 2, 3, 7]), format_row_numbers(range(1, 41, 2))
    ('row 4', 'rows 1-3, 7', 'rows 1, 3, 5, 7, 9, 11, 13, 15, ... (20 rows)')
    """
    if len(rows) == 1:
        return f"row {rows[0]}"
    spans: list[list[int]] = []
    for row in rows:
        if spans and row == spans[-1][1] + 1:
            spans[-1][1] = row
        else:
            spans.append([row, row])
    shown = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans[:SHOWN_SPANS])
    return f"rows {shown}" + (f", ... ({len(rows):,} rows)" if len(spans) > SHOWN_SPANS else "")
