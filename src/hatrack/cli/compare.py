"""`hatrack compare`: scores adapters and their base on the same rows."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from hatrack.cli.adapter_options import LoadHat, complete_name, with_adapter_options
from hatrack.cli.options import Json, recipe_option
from hatrack.errors import AdapterError

if TYPE_CHECKING:
    from hatrack.evaluate.compare import Comparison, Comparisons


Adapters = Annotated[
    list[str],
    typer.Argument(
        metavar="ADAPTER",
        help="Adapters of one base: their names or folders.",
        autocompletion=complete_name,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="FILE",
        help="Rows to score. Default: the held-out rows of the adapters' runs.",
        rich_help_panel="Data",
    ),
]

BAD_ROWS_HELP = (
    "If some rows cannot be scored: refuse to start, or skip those rows. "
    "Default: the setting that the first adapter was trained with."
)


@with_adapter_options
def compare(
    adapter: Adapters,
    *,
    data: Data = None,
    text: Annotated[str | None, recipe_option("text")] = None,
    label: Annotated[str | None, recipe_option("label")] = None,
    prompt: Annotated[str | None, recipe_option("prompt")] = None,
    completion: Annotated[str | None, recipe_option("completion", "Column with the answer.")] = None,
    messages: Annotated[str | None, recipe_option("messages")] = None,
    bad_rows: Annotated[str | None, recipe_option("bad_rows", BAD_ROWS_HELP)] = None,
    load_hat: LoadHat,
    as_json: Json = False,
) -> None:
    """Score adapters and their base on the same rows.

    Prints which is better, with a 95% confidence interval. Leaves out every row that any of the adapters was trained
    on, even if it comes from another file.
    """
    columns = {"text": text, "label": label, "prompt": prompt, "completion": completion, "messages": messages}
    options = {name: value for name, value in {**columns, "bad_rows": bad_rows}.items() if value is not None}
    _check_names(adapter)
    hat = load_hat()

    from hatrack.console import say
    from hatrack.evaluate.compare import compare as run
    from hatrack.evaluate.held_out import held_out_rows

    scored = held_out_rows(hat, data, **options)
    say(f"comparing on {len(next(iter(scored.values()))):,} rows")
    found = run(hat, scored)
    print(json.dumps(found.as_json()) if as_json else "\n".join(_lines(found)))


def _check_names(adapters: list[str]) -> None:
    """Checks the adapters before the base is loaded.

    Raises AdapterError if an adapter is named twice, or if the adapters cannot be compared with each other.
    """
    from hatrack.adapter.card import read_card
    from hatrack.adapter.registry import find_adapter
    from hatrack.evaluate.comparable import check_comparable

    folders = {name: find_adapter(name).resolve() for name in adapters}
    if len(set(folders.values())) < len(adapters):
        raise AdapterError("an adapter is named twice", got=" ".join(adapters), fix="name each adapter once")
    read = {name: read_card(folder) for name, folder in folders.items()}
    cards = {name: card for name, card in read.items() if card is not None}
    if len(cards) > 1:
        check_comparable(cards)


def _lines(found: "Comparisons") -> list[str]:
    first = next(iter(found.adapters.values()))
    if len(found.adapters) == 1:
        return [
            f"{first.metric:<11} base {first.base:.4f}, adapter {first.adapter:.4f}",
            f"difference  {_difference(first)}",
            f"verdict     {first.verdict}{_few_rows(first)}",
        ]
    lines = [f"{first.metric} on {first.rows:,} rows{_few_rows(first)}", f"base: {first.base:.4f}"]
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


def _few_rows(found: "Comparison") -> str:
    from hatrack.evaluate.held_out import FEWEST_ROWS

    return f" (fewer than {FEWEST_ROWS} rows)" if found.rows < FEWEST_ROWS else ""
