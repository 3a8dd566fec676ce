"""The options of every command that loads an adapter."""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hatrack.cli.options import keyword, with_parameters
from hatrack.cli.unused_imports import skip_quantizers

if TYPE_CHECKING:
    from hatrack.inference.hat import Hat


def complete_name(incomplete: str) -> list[str]:
    """The registered adapters that begin so, for the shell's completion."""
    from hatrack.adapter.registry import names

    return [name for name in names() if name.startswith(incomplete)]


Adapter = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="An adapter: its name or folder.", autocompletion=complete_name)
]
Base = Annotated[
    str | None, typer.Option("--base", metavar="MODEL", help="Where the base is now, if it moved: a hub id or folder.")
]
OtherBase = Annotated[
    bool, typer.Option("--allow-other-base", help="Load the adapter although it was trained on other weights.")
]
Trust = Annotated[
    str | None,
    typer.Option(
        "--trust-remote-code", metavar="MODEL", help="The base's name again, to run code from its repository."
    ),
]
NoProof = Annotated[
    bool, typer.Option("--no-proof", help="Do not check the adapter with two short forward passes first.")
]
Device = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda|mps|xpu", help="Where to compute.")]
Dtype = Annotated[
    str, typer.Option("--dtype", metavar="auto|float32|bfloat16|float16", help="The base's dtype in memory.")
]
Memory = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", help="The most memory to use, such as 3GiB. A larger base stays on disk."),
]

LOAD_OPTIONS: dict[str, tuple[Any, Any]] = {
    "base": (Base, None),
    "allow_other_base": (OtherBase, False),
    "trust_remote_code": (Trust, None),
    "no_proof": (NoProof, False),
    "device": (Device, "auto"),
    "dtype": (Dtype, "auto"),
    "memory": (Memory, None),
}
"""Name -> (type, default)."""
LoadHat = Callable[[], "Hat"]


def with_adapter_options(command: Callable[..., None]) -> Callable[..., None]:
    """Decorates `command(adapter, ..., load_hat, ...)`: the options that loading takes replace `load_hat`.

    `adapter` is one adapter or a list of them. The command calls `load_hat()` once its own options are checked,
    because loading a base takes seconds.
    """
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name == "load_hat":
            parameters += [keyword(each, kind, default) for each, (kind, default) in LOAD_OPTIONS.items()]
        else:
            parameters.append(parameter)

    def run(**values: Any) -> None:
        options = {name: values.pop(name) for name in LOAD_OPTIONS}
        command(**values, load_hat=functools.partial(_load, values["adapter"], **options))

    return with_parameters(run, parameters, doc=command.__doc__)


def _load(adapter: str | list[str], *, no_proof: bool, **options: Any) -> "Hat":
    skip_quantizers(*([adapter] if isinstance(adapter, str) else adapter))
    from hatrack.inference.load import load

    return load(adapter, prove=not no_proof, **options)
