"""Flags, help and docs/options.md, all made from the fields of the recipe.

`python -m hatrack.cli.options FILE` writes the options page.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from hatrack.recipe import RECIPE_SUFFIXES, Recipe, choices, flag, option_detail
from hatrack.storage import write_file

DATA_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".txt")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def with_recipe(
    command: Callable[..., None] | None = None, *, adapter: Callable[..., None] | None = None
) -> Callable[..., Any]:
    """Gives `command(recipe, **rest)` the flags of every recipe option, and a recipe or data file as its argument.

    With `adapter` the argument may also be an adapter, which goes to `adapter(argument, flags, **rest)`. The values
    stay text until the recipe checks them, so that each complaint is made in one place, in one form.
    """
    if command is None:
        return functools.partial(with_recipe, adapter=adapter)
    own = [parameter for name, parameter in inspect.signature(command).parameters.items() if name != "recipe"]
    metavar, help = (
        "[RECIPE.yaml|DATA]",
        "A recipe file; flags override its options. Or the data file, as with --data.",
    )
    if adapter is not None:
        metavar, help = "[RECIPE.yaml|DATA|ADAPTER]", f"{help} Or an adapter: its folder, or its name on the rack."
    file = Annotated[Path | None, typer.Argument(metavar=metavar, help=help)]
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("recipe_file", kind, default=None, annotation=file)]
    parameters += [inspect.Parameter(name, kind, default=None, annotation=_flag(name)) for name in Recipe.model_fields]
    parameters += [parameter.replace(kind=kind) for parameter in own]

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        rest = {parameter.name: values.pop(parameter.name) for parameter in own}
        path = values.pop("recipe_file")
        given = {name: value for name, value in values.items() if value is not None}
        if (
            adapter is not None
            and path is not None
            and path.suffix.lower() not in RECIPE_SUFFIXES
            and not is_data(path)
        ):
            adapter(str(path), given, **rest)
            return
        command(Recipe.of(path, **given) if path else Recipe.make(**given), **rest)

    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del wrapped.__wrapped__  # else the signature of `command` would be read instead
    return wrapped


def is_data(path: Path) -> bool:
    """Whether an argument names a data file: one that is there, or a name with the suffix of one."""
    return path.is_file() or any(suffix.lower() in DATA_SUFFIXES for suffix in path.suffixes)


def _flag(name: str) -> Any:
    field = Recipe.model_fields[name]
    if field.annotation is bool:
        return Annotated[
            bool | None, typer.Option(flag(name), help=field.description, rich_help_panel=option_detail(field, "group"))
        ]
    shown = "|".join(choices(field)) or option_detail(field, "metavar")
    text = f"{field.description} Default: {field.default}." if field.default is not None else field.description
    option = typer.Option(
        flag(name),
        help=escape(str(text)),
        metavar=shown,
        rich_help_panel=option_detail(field, "group"),
        autocompletion=lambda incomplete: [word for word in choices(field) if word.startswith(incomplete)],
    )
    return Annotated[str | None, option]


def options_page() -> str:
    """docs/options.md: every option under its heading, with its default and what it does."""
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
