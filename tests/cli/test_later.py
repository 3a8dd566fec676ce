"""Modules that are imported once something is asked of them that is not known without."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from hatrack.cli.later import execute, later, once_imported

EXECUTED: list[str] = []
NAMES = "laid_by", "laid_by.inner", "laid_by.outer"


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package that imports one of its two modules, each of which says when it is executed."""
    (tmp_path / "laid_by").mkdir()
    say = f"import {__name__}; {__name__}.EXECUTED.append(__name__)\n"
    (tmp_path / "laid_by" / "__init__.py").write_text(say + "from .inner import depth\nanswer, more = 'true', 'more'\n")
    (tmp_path / "laid_by" / "inner.py").write_text(say + "depth = 1\n")
    (tmp_path / "laid_by" / "outer.py").write_text(say + "from laid_by import more\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = list(sys.meta_path)
    EXECUTED.clear()
    yield
    sys.meta_path[:] = before
    for name in NAMES:
        sys.modules.pop(name, None)


def laid_by() -> ModuleType:
    return importlib.import_module("laid_by")


def test_what_is_known_takes_no_execution() -> None:
    later("laid_by", answer="known")
    from laid_by import answer  # type: ignore[import-not-found]

    assert (answer, laid_by().answer, EXECUTED) == ("known", "known", [])
    assert importlib.util.find_spec("laid_by") is not None
    assert EXECUTED == []
    with pytest.raises(AttributeError):
        laid_by().__wrapped__  # noqa: B018  # Python asks for such names by itself
    assert EXECUTED == []


def test_anything_else_executes_it_in_its_place() -> None:
    later("laid_by", answer="known")
    held = laid_by()
    assert held.more == "more"
    assert held is laid_by() and type(held) is ModuleType
    assert (held.answer, held.depth, EXECUTED) == ("true", 1, ["laid_by", "laid_by.inner"])
    with pytest.raises(AttributeError):
        held.never  # noqa: B018
    execute(held)
    assert EXECUTED == ["laid_by", "laid_by.inner"]


@pytest.mark.parametrize("name", ["laid_by.inner", "laid_by.outer"])
def test_a_module_in_it_comes_after_it_and_once(name: str) -> None:
    later("laid_by", answer="known")
    module = importlib.import_module(name)
    assert sorted(EXECUTED) == sorted({"laid_by", "laid_by.inner", name})
    assert module is sys.modules[name] is getattr(laid_by(), name.rpartition(".")[2])
    assert module.__spec__ is not None and module.__spec__.origin == module.__file__


def test_a_module_in_it_can_be_laid_by_too() -> None:
    later("laid_by")
    later("laid_by.inner", depth=2)
    from laid_by.inner import depth  # type: ignore[import-not-found]

    assert (depth, EXECUTED) == (2, [])
    execute(sys.modules["laid_by.inner"])
    assert (sys.modules["laid_by.inner"].depth, EXECUTED) == (1, ["laid_by.inner"])
    assert laid_by().depth == 1


def test_what_is_there_or_nowhere_is_left_alone() -> None:
    module = laid_by()
    later("laid_by", answer="known")
    later("laid_by.nowhere", answer="known")
    later("nowhere_at_all", answer="known")
    later("nowhere_at_all.either", answer="known")
    assert laid_by() is module and module.answer == "true"
    assert "laid_by.nowhere" not in sys.modules and "nowhere_at_all" not in sys.modules
    assert "nowhere_at_all.either" not in sys.modules


def test_once_imported_also_where_it_was_looked_for_before() -> None:
    seen: list[str] = []
    once_imported("laid_by", lambda module: seen.append(module.more))
    assert importlib.util.find_spec("laid_by") is not None
    assert seen == []
    laid_by()
    assert seen == ["more"]
    importlib.reload(laid_by())
    assert seen == ["more"]
