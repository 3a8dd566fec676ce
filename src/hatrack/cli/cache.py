"""`hatrack cache`: shows or clears what hatrack has cached on disk."""

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
    action: Annotated[str | None, typer.Argument(metavar="[clear]", help="clear: delete all listed entries.")] = None,
    as_json: Json = False,
) -> None:
    """Show, or clear, what hatrack has cached on disk.

    Lists hidden states below the adapted layers (train --layers top-N) and quantized bases (--quantize).
    Tokenized rows and downloads are cached too, but neither listed nor cleared.
    """
    from hatrack.base import quantized_cache
    from hatrack.training import hidden_states

    if action not in (None, "clear"):
        raise RecipeError("unknown action", got=action, fix="use hatrack cache, or hatrack cache clear")
    if action == "clear":
        tried = [(entry.bytes, hidden_states.remove_entry(entry)) for entry in hidden_states.list_entries()]
        tried += [(entry.bytes, quantized_cache.remove_entry(entry)) for entry in quantized_cache.list_entries()]
        _print_cleared(tried, as_json)
        return
    found = [
        _facts(entry, "layers") | {"layers_below": entry.about.get("layers"), "rows": hidden_states.count_rows(entry)}
        for entry in hidden_states.list_entries()
    ]
    found += [_facts(entry, "weights") for entry in quantized_cache.list_entries()]
    found.sort(key=lambda facts: facts["last_used"], reverse=True)
    if as_json:
        print(json.dumps({"folder": str(cache_dir()), "entries": found}))
    elif not found:
        print(
            f"Nothing is cached in {cache_dir()}. hatrack train --layers top-N caches hidden states; "
            "hatrack train --quantize caches quantized bases."
        )
    else:
        _print_entries(found)


def _print_entries(found: list[dict[str, Any]]) -> None:
    rows = [["BASE", "CACHED", "FORMAT", "SIZE", "LAST USED"]]
    for facts in found:
        base = facts["base"] or ("(unfinished)" if facts["folder"].rpartition("/")[2].startswith(".") else "(damaged)")
        dtype = f"{facts['dtype'] or ''}" + ("" if facts["quantize"] in (None, "none") else f", {facts['quantize']}")
        cached = "quantized weights"
        if facts["kind"] == "layers":
            cached = f"{facts['rows']:,} rows" + (f" after {facts['layers_below']} layers" if facts["base"] else "")
        rows.append([base, cached, dtype, format_size(facts["bytes"]), age(facts["last_used"])])
    print_table(rows)
    print(f"\n{format_size(sum(facts['bytes'] for facts in found))} in {cache_dir()}; hatrack cache clear deletes it")


def _print_cleared(tried: list[tuple[int, bool]], as_json: bool) -> None:
    """Prints what was freed. `tried` has (bytes, whether deleted) per entry: entries in use are not deleted."""
    freed, used = sum(count for count, deleted in tried if deleted), sum(not deleted for _, deleted in tried)
    if as_json:
        print(json.dumps({"removed": len(tried) - used, "freed_bytes": freed, "in_use": used}))
        return
    print(f"{format_size(freed)} freed" + (f"; {used} not deleted: running commands use them" if used else ""))


def _facts(entry: "CacheEntry", kind: str) -> dict[str, Any]:
    used = datetime.fromtimestamp(entry.used, UTC).isoformat(timespec="seconds")
    about = {name: entry.about.get(name) for name in ("base", "fingerprint", "dtype", "quantize")}
    return {"folder": str(entry.folder), "kind": kind, **about, "bytes": entry.bytes, "last_used": used}
