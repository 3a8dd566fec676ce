"""Checks that an installed library has the private names that hatrack uses.

Imports none of them.
"""

import importlib
import inspect
from importlib import metadata
from typing import Any

from hatrack.errors import MachineError


def require(library: str, *names: str) -> None:
    """Raises MachineError where `library` lacks one of `names`, such as "transformers.Trainer._get_grad_norm(model)".

    Names in brackets are the parameters that a function has to have, after `self`; further ones need a default.
    An attribute that a function sets stands behind its name: "bitsandbytes.nn.Linear4bit.__init__.compute_dtype".
    """
    missing = [name for name in names if not _is_there(name)]
    if missing:
        raise MachineError(
            f"hatrack does not work with this version of {library}, which has no {', no '.join(missing)}",
            got=f"{library} {metadata.version(library)}",
            fix=f"pip install '{supported(library)}'",
        )


def supported(library: str) -> str:
    """The versions of a library that hatrack declares it works with, as pip takes them: `peft<0.23,>=0.20`."""
    try:
        declared = metadata.requires("hatrack") or []
    except metadata.PackageNotFoundError:  # run from its source, without being installed
        return library
    found = (line.partition(";")[0].strip() for line in declared)
    return next((line for line in found if line.lower().startswith(library.lower())), library)


def _is_there(path: str) -> bool:
    name, _, parameters = path.removesuffix(")").partition("(")
    owner, _, last = name.rpartition(".")
    try:
        holder = find(owner)
    except (ImportError, AttributeError):
        return False
    if not hasattr(holder, last):  # an attribute of instances: declared by their class, or set by this function
        code = getattr(holder, "__code__", None)
        return last in getattr(holder, "__annotations__", {}) or last in getattr(code, "co_names", ())
    return not parameters or _takes(getattr(holder, last), parameters.split(", "))


def find(path: str) -> Any:
    """The module, class or function of this name, imported where it has to be."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        owner, _, last = path.rpartition(".")
        if not owner:
            raise
        return getattr(find(owner), last)


def _takes(function: Any, expected: list[str]) -> bool:
    """Whether a function has these parameters first, and no more without a default."""
    parameters = [p for name, p in inspect.signature(function).parameters.items() if name != "self"]
    further = parameters[len(expected) :]
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [p.name for p in parameters[: len(expected)]]
    return names == expected and all(p.default is not p.empty or p.kind in kinds for p in further)
