"""The options shared by all commands that load an adapter."""

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
    """Returns the registered names that start with `incomplete`, for shell completion."""
    from hatrack.adapter.registry import names

    return [name for name in names() if name.startswith(incomplete)]


Adapter = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="An adapter: its name or folder.", autocompletion=complete_name)
]
Base = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="The base's new location if it has moved: a hub id or folder."),
]
OtherBase = Annotated[
    bool, typer.Option("--allow-other-base", help="Load the adapter even if it was trained on different base weights.")
]
Trust = Annotated[
    str | None,
    typer.Option(
        "--trust-remote-code",
        metavar="MODEL",
        help="Allow the base's own Python code to run: repeat the base's name to confirm.",
    ),
]
NoProof = Annotated[
    bool,
    typer.Option(
        "--no-proof",
        help="Skip the check that the loaded adapter reproduces its recorded outputs (two short forward passes).",
    ),
]
Device = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda|mps|xpu", help="Device to compute on.")]
Dtype = Annotated[
    str, typer.Option("--dtype", metavar="auto|float32|bfloat16|float16", help="The base's dtype in memory.")
]
Memory = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", help="Maximum memory to use, such as 3GiB. A larger base stays on disk."),
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
    """Decorates `command(adapter, ..., load_hat, ...)`: replaces its parameter `load_hat` by the options of `load`.

    `adapter` is one adapter or a list of them. The command calls `load_hat()` after checking its own options, because
    loading a base takes seconds.
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
