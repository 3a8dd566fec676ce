"""What pyproject.toml declares is what hatrack imports, and both constraints files are within it."""

import ast
import re
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.rooms import FILES, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DECLARED = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()}
NOT_IMPORTED = {
    "accelerate": "transformers' Trainer needs it",
    "datasets": "imported by name in data/hub.py",
    "gguf": "transformers reads GGUF files with it",
    "pip": "run as a command by wheels.py",
}
OF_EXTRAS = {"bitsandbytes"}
CALLED_OTHERWISE = {"yaml": "pyyaml"}


def _imported() -> set[str]:
    """The third-party packages that hatrack imports, by the names that pip knows them by."""
    found = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add((node.module or "").partition(".")[0])
    theirs = found - sys.stdlib_module_names - {"hatrack"}
    return {canonicalize_name(CALLED_OTHERWISE.get(name, name)) for name in theirs}


def _pins(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text().split()
    return {canonicalize_name(line.partition("==")[0]): Version(line.partition("==")[2]) for line in lines}


def test_what_is_imported_is_declared_and_what_is_declared_is_used() -> None:
    declared = {canonicalize_name(requirement.name) for requirement in DECLARED}
    assert _imported() - declared <= OF_EXTRAS
    assert declared - _imported() == set(NOT_IMPORTED)


@pytest.mark.parametrize("extra", ["quantize", "bench", "dev"])
def test_each_extra_is_used(extra: str) -> None:
    assert set(EXTRAS) == {"quantize", "bench", "dev"}
    files = [path for folder in ("src", "bench", "tests") for path in (ROOT / folder).rglob("*.py")]
    text = "\n".join(path.read_text() for path in files) + (ROOT / "Makefile").read_text()
    by_import = {"scikit-learn": "sklearn", "types-pyyaml": "yaml", "types-psutil": "psutil", "pytest-xdist": "-n 2"}
    for requirement in EXTRAS[extra]:
        assert by_import.get(canonicalize_name(requirement.name), requirement.name) in text, requirement


def test_constraints_are_within_the_ranges() -> None:
    newest, oldest = _pins("constraints.txt"), _pins("constraints-oldest.txt")
    for requirement in [*DECLARED, *EXTRAS["quantize"]]:
        name = canonicalize_name(requirement.name)
        if name == "pip":
            continue
        assert newest[name] in requirement.specifier, requirement
        bound = re.search(r">=([\d.]+)", str(requirement.specifier))
        assert bound is not None and oldest[name] == Version(bound[1]), requirement


def test_python_is_as_declared() -> None:
    assert PROJECT["requires-python"] == ">=3.11"
    assert "Programming Language :: Python :: 3.11" in PROJECT["classifiers"]
    assert (ROOT / "src" / "hatrack" / "py.typed").exists()
