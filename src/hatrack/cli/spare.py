"""What a command need not import, nor do twice while it imports. docs/log.md has the seconds.

All of it holds for the whole process: it is for commands, whose process is theirs alone, and never for the library.
"""

import functools
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from hatrack.recipe import Recipe
from hatrack.wheels import is_pypi


def leave_out(recipe: Recipe) -> None:
    """Leaves out what a training by `recipe` has no use for. Does nothing once transformers is imported.

    transformers and peft import some packages wherever they are installed. They ask first whether a package is there,
    and do without it where it is not: `None` in its place is what Python takes for "not installed". Nothing is left out
    for a tracker, which may want any of them, nor for a resumed run, whose recipe is not read yet.
    """
    if "transformers" in sys.modules or recipe.report_to != "none" or recipe.resume:
        return
    unused: set[str] = set()
    if recipe.quantize == "none":
        unused |= {"bitsandbytes", "scipy"}  # transformers uses the second for losses of object detection
    sources = (str(source) for source in (recipe.data, recipe.eval_data) if source is not None)
    if all(is_pypi(source) or Path(source).is_file() for source in sources):
        unused.add("datasets")  # and with it pandas
    for name in unused:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def list_models_once() -> None:
    """Has transformers list the names in its model files once while it is imported, not twice.

    It keeps what it finds, but of 128 folders at most, and meanwhile has more than 500 of them.
    """
    if "transformers" not in sys.modules:
        sys.meta_path.insert(0, _KeepsAll())


class _KeepsAll(MetaPathFinder):
    """Finds the one module that lists them, and has it keep all it lists."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "transformers.utils.import_utils":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                listing: Any = getattr(module, "create_import_structure_from_path", None)
                if hasattr(listing, "cache_info"):
                    module.create_import_structure_from_path = functools.cache(listing.__wrapped__)

            loader.exec_module = exec_module
        return spec
