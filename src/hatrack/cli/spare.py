"""What a command need not import, nor do twice while it imports. docs/log.md has the seconds.

All of it holds for the whole process: it is for commands, whose process is theirs alone, and never for the library.
"""

import functools
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hatrack.cli.later import execute, later, once_imported
from hatrack.recipe import Recipe
from hatrack.wheels import is_pypi


def leave_out(recipe: Recipe) -> None:
    """Leaves out what a training by `recipe` has no use for. Does nothing once transformers is imported.

    transformers and peft import some packages wherever they are installed. They ask first whether a package is there,
    and do without it where it is not: `None` in its place is what Python takes for "not installed". Nothing is left out
    for a tracker, which may want any of them, nor for a resumed run, whose recipe is not read yet.
    """
    if recipe.report_to != "none" or recipe.resume:
        return
    unused: set[str] = set()
    if recipe.quantize == "none":
        unused |= QUANTIZERS
    sources = (str(source) for source in (recipe.data, recipe.eval_data) if source is not None)
    if all(is_pypi(source) or Path(source).is_file() for source in sources):
        unused.add("datasets")  # and with it pandas
    _not_installed(unused)


def leave_out_to_open(*adapters: str) -> None:
    """The same for opening adapters that hatrack made, on a base which was not quantised.

    Raises AdapterError, before anything slow is imported, where there is no such adapter or hatrack.json is malformed.
    """
    from hatrack.adapter.card import read_card
    from hatrack.adapter.registry import find_adapter

    hats = [read_card(find_adapter(adapter)) for adapter in adapters]
    if all(hat is not None and hat.recipe.get("quantize", "none") == "none" for hat in hats):
        _not_installed(QUANTIZERS)


QUANTIZERS = {"bitsandbytes", "scipy"}  # transformers uses the second for losses of object detection


def _not_installed(packages: set[str]) -> None:
    if "transformers" not in sys.modules:
        for name in packages:
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def list_models_once() -> None:
    """Has transformers list the names in its model files once while it is imported, not twice, and in less time.

    It keeps what it finds, but of 128 folders at most, and meanwhile has more than 500 of them.
    """
    if "transformers" not in sys.modules:
        once_imported("transformers.utils.import_utils", _list_less)


def leave_out_of_torch() -> None:
    """Leaves out torch's compiler, its packages for many processes, and sympy, until something wants them.

    transformers imports all of them wherever torch has them. A command that compiles nothing asks the compiler only for
    what is then nothing to do, and whether something is of a class of its own: `later` answers that. A process among
    many, as torchrun starts them, is left alone.
    """
    if "torch" not in sys.modules and os.environ.get("WORLD_SIZE", "1") == "1":
        once_imported("torch", _uncompiled_and_alone)


def _list_less(module: Any) -> None:
    names: Any = getattr(module, "fetch__all__", None)
    if names is not None:  # takes a file apart into lines; those before its `__all__` are most of them
        module.fetch__all__ = lambda content: names(content[max(content.find("\n__all__"), 0) :])
    listing: Any = getattr(module, "create_import_structure_from_path", None)
    if hasattr(listing, "cache_info"):
        module.create_import_structure_from_path = functools.cache(listing.__wrapped__)


def _uncompiled_and_alone(torch: Any) -> None:
    """What training asks of what is left out, with the answers for one process that compiles nothing."""
    torch.distributed.is_available = lambda: False
    later("torch.distributed.tensor", DTensor=_Never)
    later("sympy", Basic=_Never)
    later(SHAPES, **{name: partial(_of_numbers, name, answer) for name, answer in OF_NUMBERS.items()})
    marks = dict.fromkeys(("disable", "allow_in_graph", "assume_constant_result"), _as_it_is)
    frames = SimpleNamespace(OptimizedModule=_Never)
    later("torch._dynamo", **marks, graph_break=lambda *_, **__: None, eval_frame=frames)
    later(MASKS, TransformGetItemToIndex=_index_by_tensor)


class _Never:
    """Nothing is one of these."""


def _as_it_is(function: Any = None, *_: Any, **__: Any) -> Any:
    """A decorator that does nothing, as `@disable` or `@disable()`."""
    return function if function is not None else _as_it_is


MASKS = "torch._dynamo._trace_wrapped_higher_order_op"


def _index_by_tensor() -> Any:
    """transformers imports this class for masks that are given as a function, which are rare; it makes one for each."""
    return execute(sys.modules[MASKS]).TransformGetItemToIndex()


SHAPES = "torch.fx.experimental.symbolic_shapes"


def _same(one: Any, other: Any) -> bool:
    return list(one) == list(other) if isinstance(one, (tuple, list)) else bool(one == other)


OF_NUMBERS: dict[str, Callable[..., Any]] = {
    "expect_true": bool,
    "guard_or_false": bool,
    "guard_or_true": bool,
    "guard_size_oblivious": bool,
    "guarding_hint_or_throw": lambda value: value,
    "has_guarding_hint": lambda value: True,
    "is_nested_int": lambda value: False,
    "statically_known_true": bool,
    "sym_and": lambda *values: all(values),
    "sym_eq": _same,
    "sym_or": lambda *values: any(values),
}
"""What a model's shapes are asked while it is made without memory, and the answers where these are plain numbers."""


def _of_numbers(name: str, answer: Callable[..., Any], *values: Any, **more: Any) -> Any:
    numbers = [number for value in values for number in (value if isinstance(value, (tuple, list)) else [value])]
    if not more and all(isinstance(number, (bool, int, float)) for number in numbers):
        return answer(*values)
    return getattr(execute(sys.modules[SHAPES]), name)(*values, **more)
