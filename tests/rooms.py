"""The rooms of hatrack and who may import whom: test_architecture.py holds the code against it.

    .venv/bin/python -m tests.rooms        writes docs/architecture.md

The page's tree is made of the first sentence of each module's docstring.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "hatrack"
FILES = sorted(SOURCE.rglob("*.py"))
PAGE = ROOT / "docs" / "architecture.md"

GROUND = {"cpu", "errors", "file_kind", "option_aliases", "recipe", "console", "storage", "wheels"}
GROUND_ROOMS = {"upstream"}
"""Rooms that every other one may import."""
MAY_IMPORT = {
    "upstream": set(),
    "base": {"kernels"},
    "kernels": set(),
    "data": set(),
    "adapter": {"base", "layers"},
    "planning": {
        "base.header",
        "base.description",
        "base.free_memory",
        "data.order",
        "adapter.count",
        "adapter.targets",
        "kernels.limits",
    },
    "layers": {"kernels"},
    "inference": {"base", "adapter", "data", "layers", "kernels"},
    "evaluate": {"base", "adapter", "data", "kernels", "inference"},
    "check": {"base", "adapter", "data", "planning"},
    "training": {"base", "adapter", "data", "layers", "planning", "check", "evaluate", "kernels", "inference"},
}

ABOUT = """# Architecture

The rooms, and who may import whom. `tests/test_architecture.py` holds the code against this page, which is written by
 `python -m tests.rooms` from the modules' own docstrings.
"""
KERNELS = """
The kernels themselves are C++, compiled at first use: `low_rank.cpp`, `attention.cpp`, `integers.cpp` and `passes.cpp`
in `kernels/`, with `vectors.h` and `low_rank_pairs.h`.
"""


def page() -> str:
    """The text of docs/architecture.md."""
    rows = [f"| {room} | {', '.join(sorted(rules)) or 'nothing more'} |" for room, rules in MAY_IMPORT.items()]
    ground = ", ".join(sorted(GROUND | GROUND_ROOMS))
    head = f"| room | may import, besides {ground} |"
    table = "\n".join([head, "| --- | --- |", *rows, "| cli | all, and inside functions too |"])
    return "\n".join([ABOUT, "```", *_tree(), "```", KERNELS, table, ""])


def _tree() -> Iterator[str]:
    yield "src/hatrack/"
    for path in FILES:
        if path.parent == SOURCE and path.name != "__init__.py":
            yield f"  {path.name:<24}{_about(path)}"
    for room in MAY_IMPORT | {"cli": set()}:
        yield f"  {room + '/':<24}{_about(SOURCE / room / '__init__.py')}"
        for path in FILES:
            if path.parent.name == room and path.name != "__init__.py":
                yield f"    {path.name:<22}{_about(path)}"


def _about(path: Path) -> str:
    """The first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(text.split("\n\n")[0].split()).split(". ")[0].removesuffix(".")


if __name__ == "__main__":
    PAGE.write_text(page())
