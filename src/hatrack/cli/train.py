"""`hatrack train`: trains an adapter on a data file."""

import gc
import json
from typing import Annotated

import typer

from hatrack.cli.adapter_options import complete_name
from hatrack.cli.options import Json, with_recipe_options
from hatrack.cli.tables import program
from hatrack.cli.unused_imports import skip_unused_imports
from hatrack.recipe import Recipe


@with_recipe_options
def train(
    recipe: Recipe,
    like: Annotated[
        str | None,
        typer.Option(
            "--like",
            metavar="ADAPTER",
            help="Reuse the options this adapter was trained with; flags override them.",
            autocompletion=complete_name,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train an adapter: hatrack train DATA --base MODEL."""
    if like is not None:
        from hatrack.training.repeat import recipe_of_adapter

        recipe = recipe_of_adapter(like, **recipe.explicit_options(), trust_remote_code=recipe.trust_remote_code)
    skip_unused_imports(recipe)
    from hatrack.training.callbacks import format_metrics
    from hatrack.training.train import train as run

    gc.freeze()  # garbage collection then skips the imported modules, which saves half a second
    hat = run(recipe)
    result = hat.result
    if as_json:
        print(json.dumps(result))
        return
    print(f"adapter    {result['adapter']}  (name: {result['name']})")
    print(f"before     {format_metrics(result['before'])}")
    print(f"after      {format_metrics(result['eval'])}")
    print(
        f"took       {result['seconds']:.1f} s for {result['steps']:,} steps, {result['tokens']:,} tokens "
        f"({result['tokens_per_second']:,.0f} per second)"
    )
    name = result["name"]
    use = f"{program()} chat {name}" if hat.task == "chat" else f'{program()} predict {name} "your text"'
    print(f"next       {use}")
    print(f"           {program()} compare {name}")
    print(f"           {program()} show {name}")
