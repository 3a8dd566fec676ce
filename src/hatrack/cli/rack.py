"""`hatrack list`, `show`, `add`, `rename` and `remove`: manage the adapters on the rack."""

import dataclasses
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hatrack.cli.adapter_options import Adapter, complete_name
from hatrack.cli.options import Json
from hatrack.cli.tables import print_facts, print_table
from hatrack.console import format_size
from hatrack.errors import join_first

if TYPE_CHECKING:
    from hatrack.adapter.registry import RegisteredAdapter

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="An adapter's name on the rack.", autocompletion=complete_name)
]


def list_rack(as_json: Json = False) -> None:
    """List the adapters on the rack.

    The rack is your list of adapters by name: hatrack train and hatrack add put adapters on it. It is stored in
    $HATRACK_HOME. Without that: in ~/.hatrack if it exists, else in your system's data folder.
    """
    from hatrack.adapter.registry import list_adapters

    found = list_adapters()
    if as_json:
        print(json.dumps({"hats": [_as_json(hat) for hat in found]}))
        return
    if not found:
        print("The rack is empty. hatrack train puts a new adapter on it, hatrack add FOLDER an existing one.")
        return
    rows = [["NAME", "BASE", "TASK", "SIZE", "METRIC", "AGE"]]
    rows += [
        [
            hat.name,
            *(
                ["(missing)", "", "", "", ""]
                if hat.missing
                else [hat.base, hat.task, format_size(hat.size), hat.metric, age(hat.created)]
            ),
        ]
        for hat in found
    ]
    print_table(rows)


def show(adapter: Adapter, as_json: Json = False) -> None:
    """Show an adapter: its base, data, scores, settings and folder."""
    from hatrack.adapter.files import read_adapter
    from hatrack.adapter.registry import find_adapter, registered_name

    folder = find_adapter(adapter)
    files = read_adapter(folder)
    name = registered_name(adapter, folder)
    card = dataclasses.asdict(files.card) | {"name": name} if files.card else None
    if as_json:
        print(json.dumps({"name": name, "folder": str(folder), "config": files.config, "hat": card}, default=str))
        return
    print_facts(_show_lines(name, folder, files.config, card or {}))


def add(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="An adapter's folder, made by hatrack or peft.")],
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            metavar="NAME",
            help="Its name on the rack. Default: the name in its hatrack.json, or else the folder's name.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Put an adapter on the rack. Its folder is not moved."""
    from hatrack.adapter.files import read_adapter
    from hatrack.adapter.registry import name_in_folder, register

    files = read_adapter(folder)
    name = name or name_in_folder(folder, files.card)
    register(name, folder)
    _print_result(
        {"name": name, "folder": str(folder)}, f"{name} is on the rack; hatrack show {name} shows it", as_json
    )


def rename(
    old: Name, new: Annotated[str, typer.Argument(metavar="NEW", help="Its new name.")], as_json: Json = False
) -> None:
    """Rename an adapter on the rack. Its folder is not renamed or moved."""
    from hatrack.adapter import registry

    registry.rename(old, new)
    _print_result({"name": new}, f"{old} is now {new}", as_json)


def remove(
    name: Name,
    files: Annotated[bool, typer.Option("--files", help="Delete the adapter's folder too.")] = False,
    as_json: Json = False,
) -> None:
    """Remove an adapter from the rack. Its folder is kept unless --files is given."""
    from hatrack.adapter import registry

    registry.unregister(name, delete_files=files)
    _print_result(
        {"name": name, "deleted": files},
        f"{name} is off the rack; {'its folder is deleted' if files else 'its folder is kept'}",
        as_json,
    )


def age(created: str | None) -> str:
    """Formats the time since an ISO date in its largest unit: `3 h`, `12 d`."""
    if not created:
        return ""
    made = datetime.fromisoformat(created)
    seconds = (datetime.now(UTC) - (made if made.tzinfo else made.replace(tzinfo=UTC))).total_seconds()
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return "now"


def _show_lines(name: str, folder: Path, config: dict[str, Any], hat: dict[str, Any]) -> dict[str, str]:
    """Returns the lines that `hatrack show` prints: label -> value."""
    from hatrack.storage import folder_size

    facts = {"name": name, "folder": f"{folder} ({format_size(folder_size(folder))})"}
    base = hat.get("base") or {}
    facts["base"] = str(base.get("source") or config.get("base_model_name_or_path") or "not named")
    facts["adapter"] = f"r {config.get('r')}, alpha {config.get('lora_alpha')}, dropout {config.get('lora_dropout')}"
    targets = config.get("target_modules") or []
    if isinstance(targets, str):  # a regular expression, or all-linear
        targets = [targets]
    facts["targets"] = join_first(targets, 8)
    if hat:
        facts["task"] = hat["task"] + (f": {', '.join(hat['labels'])}" if hat["labels"] else "")
        facts["data"] = (
            f"{hat['data'].get('source')} ({hat['data'].get('rows'):,} rows, {hat['data'].get('held_out'):,} held out)"
        )
        for when in ("before", "after"):
            scores = (hat["metrics"] or {}).get(when) or {}
            facts[when] = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        facts["made"] = f"{hat['created']} ({age(hat['created'])})"
        facts["recipe"] = ", ".join(f"{name}: {value}" for name, value in hat["recipe"].items())
    return facts


def _as_json(hat: "RegisteredAdapter") -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(hat).items()}


def _print_result(facts: dict[str, Any], line: str, as_json: bool) -> None:
    print(json.dumps(facts) if as_json else line)
