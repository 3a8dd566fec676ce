"""Ends a run of the fuzzers with a table of what was tried and how it ended."""

from typing import Any

from tests.fuzz.watch import outcomes


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Both columns are to be there: mutations that are all taken, or all refused, try nothing."""
    if outcomes:
        terminalreporter.write_line("\n| mutated | tried | taken | refused |\n| --- | --- | --- | --- |")
        for kind in dict.fromkeys(kind for kind, _ in outcomes):
            taken, refused = outcomes[kind, "taken"], outcomes[kind, "refused"]
            terminalreporter.write_line(f"| {kind} | {taken + refused:,} | {taken:,} | {refused:,} |")
        terminalreporter.write_line(f"in all: {sum(outcomes.values()):,}")
