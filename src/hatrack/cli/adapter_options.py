"""How a command opens an adapter on its base: the same options for all that do."""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hatrack.cli.unused_imports import skip_quantizers

if TYPE_CHECKING:
    from hatrack.inference.hat import Hat


def names_on_the_rack(incomplete: str) -> list[str]:
    """What a shell offers for an adapter that is half typed."""
    from hatrack.adapter.registry import names

    return [name for name in names() if name.startswith(incomplete)]


Adapter = Annotated[
    str,
    typer.Argument(help="A name that `hatrack list` shows, or an adapter's folder.", autocompletion=names_on_the_rack),
]
BaseOption = Annotated[str | None, typer.Option("--base", help="Where the base lies now, if it moved.")]
OtherBase = Annotated[
    bool, typer.Option("--allow-other-base", help="Go on although the adapter was trained on other weights.")
]
Trust = Annotated[str | None, typer.Option("--trust-remote-code", help="The base's name, where its own code may run.")]
NoProof = Annotated[bool, typer.Option("--no-proof", help="Do not run the adapter's proof first: for huge bases.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, mps or xpu.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Memory = Annotated[
    str | None, typer.Option("--memory", help="The most memory to take, such as 3GiB. A larger base stays on disk.")
]

OPTIONS: dict[str, tuple[Any, Any]] = {
    "base": (BaseOption, None),
    "allow_other_base": (OtherBase, False),
    "trust_remote_code": (Trust, None),
    "no_proof": (NoProof, False),
    "device": (Device, "auto"),
    "dtype": (Dtype, "auto"),
    "memory": (Memory, None),
}
"""Each with its default."""
OpenHat = Callable[[], "Hat"]


def with_hat(command: Callable[..., None]) -> Callable[..., None]:
    """Gives `command(adapter, ..., open_hat, ...)` the options that opening `adapter` takes, in place of `open_hat`;
    `adapter` may be several.

    It is opened when the command calls `open_hat()`, after its own complaints: a base takes seconds to load.
    """
    kind = inspect.Parameter.KEYWORD_ONLY
    opening = [
        inspect.Parameter(name, kind, default=default, annotation=option) for name, (option, default) in OPTIONS.items()
    ]
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        parameters += opening if name == "open_hat" else [parameter.replace(kind=kind)]

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        options = {name: values.pop(name) for name in OPTIONS}
        command(**values, open_hat=functools.partial(_opened, values["adapter"], **options))

    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del wrapped.__wrapped__  # else the signature of `command` would be read instead
    return wrapped


def _opened(adapter: str | list[str], *, no_proof: bool, **options: Any) -> "Hat":
    skip_quantizers(*([adapter] if isinstance(adapter, str) else adapter))
    from hatrack.inference.load import load

    return load(adapter, prove=not no_proof, **options)
