"""Modules that are imported only once something is asked of them that is not known without."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def once_imported(name: str, then: Callable[[Any], None]) -> None:
    """Has `then` done with the module `name` as soon as it is imported."""
    sys.meta_path.insert(0, _Then(name, then))


def later(name: str, **answers: Any) -> None:
    """Puts a module in the place of `name` that has `answers`, and becomes `name` itself when asked for anything else.

    Whoever was given an answer keeps it. Does nothing where `name` is imported already or is not to be found, or where
    the package that it is in is not imported yet.
    """
    parent, _, short = name.rpartition(".")
    if name in sys.modules or (parent and parent not in sys.modules):
        return
    spec = PathFinder.find_spec(name, _folders(sys.modules[parent]) if parent else None)
    if spec is None:
        return
    sys.modules[name] = module = _Later(spec, answers)
    if parent:
        setattr(sys.modules[parent], short, module)
    if not any(isinstance(finder, _ParentFirst) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ParentFirst())


def execute(module: Any) -> Any:
    """Executes a module of `later` in its place, if that was not done yet; from then on it is one like any other.

    Returns it, and any other module as it is.
    """
    if isinstance(module, _Later):
        for name in module.__dict__.pop("answers"):
            del module.__dict__[name]
        module.__class__ = ModuleType  # type: ignore[assignment]
        loader: Any = module.__loader__
        loader.exec_module(module)
    return module


class _Later(ModuleType):
    def __init__(self, spec: ModuleSpec, answers: dict[str, Any]) -> None:
        super().__init__(spec.name)
        self.__dict__.update(answers, answers=answers)
        self.__spec__, self.__loader__, self.__file__, self.__package__ = spec, spec.loader, spec.origin, spec.parent
        if _folders(self) is not None:
            self.__path__ = _folders(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python asks modules for these, and does without
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(execute(self), name)


def _folders(module: Any) -> Any:
    return module.__spec__.submodule_search_locations  # None where it is no package


class _Then(MetaPathFinder):
    """Finds the one module `name`, and has `then` done with it."""

    def __init__(self, name: str, then: Callable[[Any], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute_it = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                sys.meta_path.remove(self)  # not when it is found: that is also how others ask if it is there
                execute_it(module)
                self.then(module)

            loader.exec_module = exec_module
        return spec


class _ParentFirst(MetaPathFinder):
    """Executes a package of `later` before anything in it is imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package = sys.modules.get(name.rpartition(".")[0])
        if not isinstance(package, _Later):
            return None
        execute(package)
        found = sys.modules.get(name)
        if found is None:
            return None
        found.__spec__ = ModuleSpec(name, _There(found))  # Python takes this one where a module has come meanwhile
        return found.__spec__


class _There(Loader):
    """Loads a module that is there already, and lays its own spec back."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec
