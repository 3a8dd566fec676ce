"""`hatrack list`, `show`, `add`, `rename`, `remove`: the rack."""

import dataclasses
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hatrack.cli.adapter_options import names_on_the_rack
from hatrack.cli.options import Json
from hatrack.cli.tables import print_facts, print_table
from hatrack.console import format_size

if TYPE_CHECKING:
    from hatrack.adapter.registry import RegisteredAdapter

Name = Annotated[
    str, typer.Argument(help="A name on the rack, or an adapter's folder.", autocompletion=names_on_the_rack)
]


def list_hats(as_json: Json = False) -> None:
    """Show every adapter on the rack."""
    from hatrack.adapter.registry import list_adapters

    found = list_adapters()
    if as_json:
        print(json.dumps({"hats": [_entry(hat) for hat in found]}))
        return
    if not found:
        print("The rack is empty. hatrack train makes an adapter, hatrack add hangs one up.")
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


def show(adapter: Name, as_json: Json = False) -> None:
    """Show one adapter: its base, data, scores and folder."""
    from hatrack.adapter.files import read_adapter
    from hatrack.adapter.registry import find_adapter, registered_name

    folder = find_adapter(adapter)
    files = read_adapter(folder)
    name = registered_name(adapter, folder)
    hat = dataclasses.asdict(files.card) | {"name": name} if files.card else None
    if as_json:
        print(json.dumps({"name": name, "folder": str(folder), "config": files.config, "hat": hat}, default=str))
        return
    print_facts(_facts(name, folder, files.config, hat or {}))


def add(
    folder: Annotated[Path, typer.Argument(help="The folder of an adapter.")],
    name: Annotated[
        str | None, typer.Option("--name", help="Its name on the rack. Default: the one it has, or else the folder's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Hang an adapter on the rack, where it lies."""
    from hatrack.adapter.card import valid_name
    from hatrack.adapter.files import read_adapter
    from hatrack.adapter.registry import register

    files = read_adapter(folder)
    name = name or valid_name(files.card.name if files.card and files.card.name else folder.resolve().name)
    register(name, folder)
    _done({"name": name, "folder": str(folder)}, f"{name} hangs on the rack", as_json)


def rename(old: Name, new: Annotated[str, typer.Argument(help="Its new name.")], as_json: Json = False) -> None:
    """Give an adapter another name on the rack."""
    from hatrack.adapter import registry

    registry.rename(old, new)
    _done({"name": new}, f"{old} is now {new}", as_json)


def remove(
    name: Annotated[str, typer.Argument(help="A name on the rack.", autocompletion=names_on_the_rack)],
    files: Annotated[bool, typer.Option("--files", help="Delete the adapter's folder as well.")] = False,
    as_json: Json = False,
) -> None:
    """Take an adapter off the rack. Its files stay, unless --files."""
    from hatrack.adapter import registry

    registry.unregister(name, delete_files=files)
    _done(
        {"name": name, "deleted": files}, f"{name} is off the rack{', its files are deleted' if files else ''}", as_json
    )


def age(created: str | None) -> str:
    """How long ago, in the largest unit that fits: `3 h`, `12 d`."""
    if not created:
        return ""
    made = datetime.fromisoformat(created)
    seconds = (datetime.now(UTC) - (made if made.tzinfo else made.replace(tzinfo=UTC))).total_seconds()
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return "now"


def _facts(name: str, folder: Path, config: dict[str, Any], hat: dict[str, Any]) -> dict[str, str]:
    """The lines of `hatrack show`."""
    from hatrack.storage import folder_size

    facts = {"name": name, "folder": f"{folder} ({format_size(folder_size(folder))})"}
    base = hat.get("base") or {}
    facts["base"] = str(base.get("source") or config.get("base_model_name_or_path") or "not named")
    facts["adapter"] = f"r {config.get('r')}, alpha {config.get('lora_alpha')}, dropout {config.get('lora_dropout')}"
    targets = config.get("target_modules") or []
    if isinstance(targets, str):  # a regular expression, or all-linear: whole
        targets = [targets]
    facts["targets"] = ", ".join(targets[:8]) + (f" and {len(targets) - 8} more" if len(targets) > 8 else "")
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


def _entry(hat: "RegisteredAdapter") -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(hat).items()}


def _done(facts: dict[str, Any], line: str, as_json: bool) -> None:
    print(json.dumps(facts) if as_json else line)
