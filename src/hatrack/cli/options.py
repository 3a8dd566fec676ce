"""Generates flags, help texts and docs/options.md from the fields of the recipe.

`python -m hatrack.cli.options FILE` writes the options page.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from hatrack.recipe import RECIPE_SUFFIXES, Recipe, choices, flag, option_detail
from hatrack.storage import write_file

DATA_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".txt")

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def with_recipe_options(
    command: Callable[..., None] | None = None, *, on_adapter: Callable[..., None] | None = None
) -> Callable[..., Any]:
    """Decorates `command(recipe, **rest)`: adds a flag for each recipe option, and a recipe or data file as argument.

    With `on_adapter`, the argument may also be an adapter; then `on_adapter(argument, given options, **rest)` is called
    instead. Values remain text until the recipe validates them, so that a mistake has the same message everywhere.
    """
    if command is None:
        return functools.partial(with_recipe_options, on_adapter=on_adapter)
    own = [parameter for name, parameter in inspect.signature(command).parameters.items() if name != "recipe"]
    metavar, help = "[RECIPE.yaml|DATA]", "A recipe file (flags override it), or a data file (as with --data)."
    if on_adapter is not None:
        metavar, help = "[RECIPE.yaml|DATA|ADAPTER]", f"{help} Or an adapter: its name or folder."
    file = Annotated[Path | None, typer.Argument(metavar=metavar, help=help)]

    def run(**values: Any) -> None:
        rest = {parameter.name: values.pop(parameter.name) for parameter in own}
        path = values.pop("recipe_file")
        given = {name: value for name, value in values.items() if value is not None}
        is_adapter = path is not None and path.suffix.lower() not in RECIPE_SUFFIXES and not is_data(path)
        if on_adapter is not None and is_adapter:
            on_adapter(str(path), given, **rest)
            return
        command(Recipe.of(path, **given) if path else Recipe.make(**given), **rest)

    flags = [
        keyword(name, Annotated[bool | None if field.annotation is bool else str | None, recipe_option(name)])
        for name, field in Recipe.model_fields.items()
    ]
    return with_parameters(run, [keyword("recipe_file", file), *flags, *own], doc=command.__doc__)


def with_parameters(
    run: Callable[..., None], parameters: Sequence[inspect.Parameter], *, doc: str | None
) -> Callable[..., None]:
    """Makes `run(**values)` a command with these parameters.

    typer reads a command's parameters from `inspect.signature`, and `__signature__` is Python's documented way to set
    what that returns. typer has no other way to add parameters: it calls a command with each of its options, so
    options added to its click command would need a function that declares them again.
    """
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    )
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = doc
    return run


def keyword(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    """Makes a keyword parameter for `with_parameters`."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def is_data(path: Path) -> bool:
    """Whether an argument names a data file: an existing file, or a path with a data file's suffix."""
    return path.is_file() or any(suffix.lower() in DATA_SUFFIXES for suffix in path.suffixes)


def recipe_option(name: str, help: str | None = None) -> Any:
    """Makes the `typer.Option` of one recipe option: its flag, allowed values, help and default.

    `help` replaces the recipe's help and default, for a command in which they differ.
    """
    field = Recipe.model_fields[name]
    panel = option_detail(field, "group")
    if field.annotation is bool:
        return typer.Option(flag(name), help=field.description, rich_help_panel=panel)
    default = f" Default: {field.default}." if field.default is not None else ""
    return typer.Option(
        flag(name),
        help=escape(help or f"{field.description}{default}"),
        metavar="|".join(choices(field)) or option_detail(field, "metavar"),
        rich_help_panel=panel,
        autocompletion=lambda incomplete: [word for word in choices(field) if word.startswith(incomplete)],
    )


def options_page() -> str:
    """Formats docs/options.md: every option under its heading, with its default and what it does."""
    lines = ["# Options", "", "Made from `src/hatrack/recipe.py` by `make format`; a test fails when it is stale.", ""]
    lines += ["On the command line write `--eval-data FILE`; in a recipe file write `eval_data: FILE`.", ""]
    headings = list(dict.fromkeys(option_detail(field, "group") for field in Recipe.model_fields.values()))
    for heading in headings:
        lines += [f"## {heading}", "", "| option | default | what it does |", "| --- | --- | --- |"]
        for name, field in Recipe.model_fields.items():
            if option_detail(field, "group") == heading:
                default = "" if field.default is None else f"`{str(field.default).lower()}`"
                words = f" One of {', '.join(f'`{word}`' for word in choices(field))}." if choices(field) else ""
                lines.append(f"| `{flag(name)}` | {default} | {field.description}{words} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    write_file(Path(sys.argv[1]), options_page())
