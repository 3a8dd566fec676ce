"""`hatrack cache`: what is kept on disk so that it need not be computed again."""

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hatrack.cli.options import Json
from hatrack.cli.rack import age
from hatrack.cli.tables import print_table
from hatrack.console import format_size
from hatrack.errors import RecipeError
from hatrack.storage import cache_dir

if TYPE_CHECKING:
    from hatrack.storage import CacheEntry


def cache(
    action: Annotated[str | None, typer.Argument(metavar="[clear]", help="clear: remove all that is shown.")] = None,
    as_json: Json = False,
) -> None:
    """Show what runs have cached on disk, or clear it.

    Hidden states below the adapted layers, and quantised bases: no run computes them again.
    """
    from hatrack.base import quantized_cache
    from hatrack.training import hidden_states

    if action not in (None, "clear"):
        raise RecipeError("hatrack cache shows, hatrack cache clear removes", got=action, fix="use one of them")
    if action == "clear":
        gone = [(entry.bytes, hidden_states.remove(entry)) for entry in hidden_states.entries()]
        gone += [(entry.bytes, quantized_cache.remove_entry(entry)) for entry in quantized_cache.list_entries()]
        _clear(gone, as_json)
        return
    found = [_layers(entry, hidden_states.count_rows(entry)) for entry in hidden_states.entries()]
    found += [_weights(entry) for entry in quantized_cache.list_entries()]
    found.sort(key=lambda facts: facts["last_used"], reverse=True)
    if as_json:
        print(json.dumps({"folder": str(cache_dir()), "entries": found}))
    elif not found:
        print(
            f"Nothing is kept in {cache_dir()}. hatrack train --layers top-N keeps what the layers below give, "
            "--quantize the base in fewer bits."
        )
    else:
        _show(found)


def _show(found: list[dict[str, Any]]) -> None:
    rows = [["BASE", "KEPT", "FORMAT", "SIZE", "LAST USED"]]
    for facts in found:
        base = facts["base"] or ("(unfinished)" if facts["folder"].rpartition("/")[2].startswith(".") else "(damaged)")
        form = f"{facts['dtype'] or ''}" + ("" if facts["quantize"] in (None, "none") else f", {facts['quantize']}")
        kept = "the base's weights"
        if facts["kind"] == "layers":
            kept = f"{facts['rows']:,} rows" + (f" after {facts['layers_below']} layers" if facts["base"] else "")
        rows.append([base, kept, form, format_size(facts["bytes"]), age(facts["last_used"])])
    print_table(rows)
    print(f"\n{format_size(sum(facts['bytes'] for facts in found))} in {cache_dir()}; hatrack cache clear removes it")


def _clear(gone: list[tuple[int, bool]], as_json: bool) -> None:
    """Says what was removed, of so many bytes each, and how many were not."""
    freed, used = sum(count for count, done in gone if done), sum(not done for _, done in gone)
    if as_json:
        print(json.dumps({"removed": len(gone) - used, "freed_bytes": freed, "in_use": used}))
        return
    print(f"{format_size(freed)} freed" + (f"; {used} kept, which running commands use" if used else ""))


def _layers(entry: "CacheEntry", rows: int) -> dict[str, Any]:
    """Results of the layers below adapters, for so many rows."""
    return _facts(entry, "layers") | {"layers_below": entry.about.get("layers"), "rows": rows}


def _weights(entry: "CacheEntry") -> dict[str, Any]:
    """A base in fewer bits."""
    return _facts(entry, "weights")


def _facts(entry: "CacheEntry", kind: str) -> dict[str, Any]:
    used = datetime.fromtimestamp(entry.used, UTC).isoformat(timespec="seconds")
    told = {name: entry.about.get(name) for name in ("base", "fingerprint", "dtype", "quantize")}
    return {"folder": str(entry.folder), "kind": kind, **told, "bytes": entry.bytes, "last_used": used}
