"""docs/gotchas.md is complete against the code: a heading for each gotcha, and no heading without one."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEADINGS = re.findall(r"^### ([a-z0-9-]+): (.+)$", (ROOT / "docs/gotchas.md").read_text(), flags=re.M)
CANNOT_HAPPEN = {"pad-is-eos", "merge-rounding", "trained-in-eval-form"}
"""Kept from happening by how hatrack is made; tests/test_evidence.py has a test of each."""


def _named_in_code() -> Iterator[str]:
    """The first argument of every Finding, refusal and look in the code."""
    files = [*(ROOT / "src/hatrack/check").glob("*.py"), ROOT / "src/hatrack/cli/check.py"]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in (
                "Finding",
                "refusal",
                "look",
                "at",
            ):
                for part in ast.walk(node.args[0]):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield part.value


def test_every_gotcha_has_a_heading_and_every_heading_a_gotcha() -> None:
    named = set(_named_in_code())
    assert len(named) > 30
    assert {name for name, _ in HEADINGS} == named | CANNOT_HAPPEN


def test_headings_are_told_apart() -> None:
    names = [name for name, _ in HEADINGS]
    assert len(names) == len(set(names))
    assert all(words[0].islower() or words[0] == "r" or words.startswith("NaN") for _, words in HEADINGS)
