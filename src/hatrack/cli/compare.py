"""`hatrack compare`: base against adapter on the same held-out rows."""

import json
from typing import Annotated

import typer

from hatrack.cli.opening import Adapter, OpenHat, with_hat
from hatrack.cli.options import Json


@with_hat
def compare(
    adapter: Adapter,
    *,
    data: Annotated[str | None, typer.Option("--data", help="Rows to compare on. Default: those held out.")] = None,
    open_hat: OpenHat,
    as_json: Json = False,
) -> None:
    """Score the base and the adapter on the same held-out rows: which is better, and how sure that is."""
    hat = open_hat()

    from hatrack.evaluate.compare import FEWEST_ROWS
    from hatrack.evaluate.compare import compare as run
    from hatrack.evaluate.held_out import held_out
    from hatrack.say import say

    rows = held_out(hat, data)
    say(f"comparing on {len(rows):,} rows")
    found = run(hat, rows)
    if as_json:
        print(json.dumps(found.as_json()))
        return
    low, high = found.ci95
    print(f"{found.metric:<11} base {found.base:.4f}, adapter {found.adapter:.4f}")
    print(f"difference  {found.difference:+.4f} (95% interval {low:+.4f} to {high:+.4f}, {found.rows:,} rows)")
    few = f" (fewer than {FEWEST_ROWS} rows)" if found.rows < FEWEST_ROWS else ""
    print(f"verdict     {found.verdict}{few}")
