"""`hatrack cache`: what is kept on disk so that it need not be computed again."""

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hatrack.cli.hats import age, print_table
from hatrack.cli.options import Json
from hatrack.errors import RecipeError
from hatrack.say import size

if TYPE_CHECKING:
    from hatrack.engine.states import Entry


def cache(
    action: Annotated[str | None, typer.Argument(metavar="[clear]", help="clear: remove all that is shown.")] = None,
    as_json: Json = False,
) -> None:
    """Show what is kept so that no run computes it again, or clear it."""
    from hatrack.engine.states import entries, root

    if action not in (None, "clear"):
        raise RecipeError("hatrack cache shows, hatrack cache clear removes", got=action, fix="use one of them")
    found = entries()
    if action == "clear":
        _clear(found, as_json)
    elif as_json:
        print(json.dumps({"folder": str(root()), "entries": [_facts(entry) for entry in found]}))
    elif not found:
        print(f"Nothing is kept in {root()}. hatrack train --layers top-N keeps what the layers below give.")
    else:
        _show(found)
        total = sum(entry.bytes for entry in found)
        print(f"\n{size(total)} in {root()}; hatrack cache clear removes it")


def _show(found: "list[Entry]") -> None:
    rows = [["BASE", "LAYERS BELOW", "FORMAT", "ROWS", "SIZE", "LAST USED"]]
    for entry in found:
        facts = _facts(entry)
        packed = "" if facts["quantize"] == "none" else f", {facts['quantize']}"
        told = (
            [facts["base"], f"{facts['layers_below']}", f"{facts['dtype']}{packed}"] if entry.about else ["(damaged)"]
        )
        told += [""] * (3 - len(told))
        rows.append([*told, f"{entry.rows:,}", size(entry.bytes), age(facts["last_used"])])
    print_table(rows)


def _clear(found: "list[Entry]", as_json: bool) -> None:
    from hatrack.engine.states import remove

    gone = [entry for entry in found if remove(entry)]
    freed, used = sum(entry.bytes for entry in gone), len(found) - len(gone)
    if as_json:
        print(json.dumps({"removed": len(gone), "freed_bytes": freed, "in_use": used}))
        return
    print(f"{size(freed)} freed" + (f"; {used} kept, which running trainings use" if used else ""))


def _facts(entry: "Entry") -> dict[str, Any]:
    about = entry.about
    used = datetime.fromtimestamp(entry.used, UTC).isoformat(timespec="seconds")
    told = {name: about.get(name) for name in ("base", "fingerprint", "dtype", "quantize")}
    told |= {"layers_below": about.get("layers"), "rows": entry.rows, "bytes": entry.bytes, "last_used": used}
    return {"folder": str(entry.folder), **told}
