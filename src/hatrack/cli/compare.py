"""`hatrack compare`: the base and adapters on the same rows, which none of them has seen."""

import json
from typing import TYPE_CHECKING, Annotated

import typer
from typer.models import OptionInfo

from hatrack.cli.adapter_options import OpenHat, names_on_the_rack, with_hat
from hatrack.cli.options import Json
from hatrack.errors import AdapterError
from hatrack.recipe import Recipe, flag

if TYPE_CHECKING:
    from hatrack.evaluate.compare import Comparison, Comparisons


def _as_in_recipes(name: str) -> OptionInfo:
    option: OptionInfo = typer.Option(flag(name), help=Recipe.model_fields[name].description, rich_help_panel="Data")
    return option


Adapters = Annotated[
    list[str],
    typer.Argument(
        metavar="ADAPTER",
        help="Names that `hatrack list` shows, or adapters' folders.",
        autocompletion=names_on_the_rack,
    ),
]
Data = Annotated[
    str | None,
    typer.Option("--data", help="Rows to compare on. Default: those held out by all.", rich_help_panel="Data"),
]


@with_hat
def compare(
    adapter: Adapters,
    *,
    data: Data = None,
    text: Annotated[str | None, _as_in_recipes("text")] = None,
    label: Annotated[str | None, _as_in_recipes("label")] = None,
    prompt: Annotated[str | None, _as_in_recipes("prompt")] = None,
    completion: Annotated[str | None, _as_in_recipes("completion")] = None,
    messages: Annotated[str | None, _as_in_recipes("messages")] = None,
    bad_rows: Annotated[str | None, _as_in_recipes("bad_rows")] = None,
    open_hat: OpenHat,
    as_json: Json = False,
) -> None:
    """Score adapters and their base on the same rows.

    Says which is better, and how sure that is.
    Rows that one of the adapters was trained on are left out, whatever file they are in.
    """
    columns = {"text": text, "label": label, "prompt": prompt, "completion": completion, "messages": messages}
    options = {name: value for name, value in {**columns, "bad_rows": bad_rows}.items() if value is not None}
    _check_names(adapter)
    hat = open_hat()

    from hatrack.console import say
    from hatrack.evaluate.compare import compare as run
    from hatrack.evaluate.held_out import held_out_rows

    scored = held_out_rows(hat, data, **options)
    say(f"comparing on {len(next(iter(scored.values()))):,} rows")
    found = run(hat, scored)
    print(json.dumps(found.as_json()) if as_json else "\n".join(_lines(found)))


def _check_names(adapters: list[str]) -> None:
    """Before a base is loaded. Raises AdapterError for an adapter named twice, and for some that cannot be compared."""
    from hatrack.adapter.card import read_card
    from hatrack.adapter.registry import find_adapter
    from hatrack.evaluate.comparable import check_comparable

    folders = {name: find_adapter(name).resolve() for name in adapters}
    if len(set(folders.values())) < len(adapters):
        raise AdapterError("an adapter is named twice", got=" ".join(adapters), fix="name each once")
    made = {name: read_card(folder) for name, folder in folders.items()}
    here = {name: hat for name, hat in made.items() if hat is not None}
    if len(here) > 1:
        check_comparable(here)


def _lines(found: "Comparisons") -> list[str]:
    first = next(iter(found.adapters.values()))
    if len(found.adapters) == 1:
        return [
            f"{first.metric:<11} base {first.base:.4f}, adapter {first.adapter:.4f}",
            f"difference  {_difference(first)}",
            f"verdict     {first.verdict}{_few(first)}",
        ]
    lines = [f"{first.metric} on {first.rows:,} rows{_few(first)}", f"base: {first.base:.4f}"]
    lines += [
        f"{name}: {each.adapter:.4f}, {each.verdict}\n  {_difference(each)}" for name, each in found.adapters.items()
    ]
    for pair, each in found.pairs.items():
        better = found.better(pair)
        verdict = f"{better} is better" if better else "undecided"
        lines.append(f"{pair[1]} against {pair[0]}: {verdict}\n  {_difference(each)}")
    return lines


def _difference(found: "Comparison") -> str:
    low, high = found.ci95
    return f"{found.difference:+.4f} (95% interval {low:+.4f} to {high:+.4f}, {found.rows:,} rows)"


def _few(found: "Comparison") -> str:
    from hatrack.evaluate.held_out import FEWEST_ROWS

    return f" (fewer than {FEWEST_ROWS} rows)" if found.rows < FEWEST_ROWS else ""
