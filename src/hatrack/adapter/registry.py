"""The rack: registers names for adapter folders on this machine.

It is the folder `rack` in `storage.data_dir()`, with one small file per name and a lock for writers.
"""

import contextlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hatrack.adapter.card import (
    CONFIG,
    VALID_NAME,
    AdapterCard,
    not_an_adapter,
    read_card,
    read_json_object,
    rename_in_files,
    valid_name,
)
from hatrack.console import say
from hatrack.errors import AdapterError, HatrackError
from hatrack.recipe import nearest
from hatrack.storage import data_dir, folder_size, locked, machine_errors, write_file


@dataclass(frozen=True)
class RegisteredAdapter:
    """An adapter on the rack. `size` in bytes; `missing`: its folder is gone or damaged."""

    name: str
    folder: Path
    base: str
    task: str
    size: int
    metric: str
    created: str
    missing: bool


def register(name: str, folder: Path, *, replace: bool = False) -> None:
    """Registers an adapter's folder under a name.

    Raises AdapterError if the name is invalid, or taken by another adapter (unless `replace`).
    """
    with _locked_rack():
        _register(name, folder, replace=replace)


def check_free(name: str, folder: Path, *, replace: bool = False) -> None:
    """Raises AdapterError if the name is invalid, or taken by another adapter (unless `replace`); MachineError if
    the rack cannot be written."""
    with _locked_rack():
        _check_free(name, folder, replace=replace)


def find_adapter(adapter: str | Path) -> Path:
    """Returns an adapter's folder, given its path or its name on the rack. Raises AdapterError if it is neither."""
    path = Path(adapter).expanduser()
    if (path / CONFIG).is_file():
        return path
    name = str(adapter)
    if VALID_NAME.fullmatch(name) and _entry(name).exists():
        folder = Path(str(read_json_object(_entry(name)).get("folder")))
        if not (folder / CONFIG).is_file():
            raise AdapterError(
                f"{name} is on the rack, but its folder is gone", got=folder, fix=f"hatrack remove {name}"
            )
        return folder
    if path.exists():
        raise not_an_adapter(path)
    known = names()
    guess = nearest(name, known)
    fix = f"did you mean {guess}?" if guess else "hatrack list shows the names" if known else "hatrack train makes one"
    raise AdapterError("there is no such adapter", got=name, fix=fix)


def list_adapters() -> list[RegisteredAdapter]:
    """All adapters on the rack, sorted by name."""
    return [_describe(name) for name in names()]


def registered_name(adapter: str | Path, folder: Path) -> str:
    """Returns an adapter's name: `adapter` if that is its name on the rack, else the name its `folder` is registered
    under, else the name in its hatrack.json, else the folder's name."""
    if VALID_NAME.fullmatch(str(adapter)) and _registered_folder(str(adapter)) == folder.resolve():
        return str(adapter)
    own = name_in_folder(folder, read_card(folder))
    on_rack = [name for name in names() if _registered_folder(name) == folder.resolve()]
    return own if own in on_rack or not on_rack else on_rack[0]


def name_in_folder(folder: Path, card: AdapterCard | None) -> str:
    """Returns the name that an adapter has by itself: the one in its hatrack.json (`card`), else its folder's name."""
    return valid_name(card.name if card and card.name else folder.resolve().name)


def rename(old: str, new: str) -> None:
    """Renames an adapter on the rack, in its hatrack.json and in its model card; its folder keeps its name.

    Raises AdapterError if `new` is taken or invalid, or `old` is not on the rack.
    """
    with _locked_rack():
        folder = _require_folder(old)
        if _entry(new).exists():
            raise AdapterError(
                f"the name {new} is taken on the rack", got=_require_folder(new), fix="choose another one"
            )
        _register(new, folder)
        _entry(old).unlink(missing_ok=True)
    try:
        rename_in_files(folder, new)
    except HatrackError as error:
        say(f"the name in its files could not be changed: {error}")


def unregister(name: str, *, delete_files: bool = False) -> None:
    """Removes a name from the rack; with `delete_files` also the folder, if it is an adapter's.

    Raises AdapterError if the name is not on the rack.
    """
    with _locked_rack():
        folder = _require_folder(name)
        if delete_files and (folder / CONFIG).is_file():
            with machine_errors(folder):
                shutil.rmtree(folder)
        _entry(name).unlink(missing_ok=True)


def _rack() -> Path:
    return data_dir() / "rack"


def _locked_rack() -> contextlib.AbstractContextManager[None]:
    """Lets one process write at a time, so that no other registers a name between the check and the write."""
    return locked(_rack() / ".lock")


def _register(name: str, folder: Path, *, replace: bool = False) -> None:
    _check_free(name, folder, replace=replace)
    write_file(_entry(name), json.dumps({"folder": str(folder.resolve())}) + "\n")


def _check_free(name: str, folder: Path, *, replace: bool = False) -> None:
    entry = _entry(name)
    if entry.exists() and not replace:
        other = Path(str(read_json_object(entry).get("folder")))
        if other != folder.resolve() and (other / CONFIG).exists():
            raise AdapterError(
                f"the name {name} is taken on the rack",
                got=other,
                fix=f"choose another --name, or hatrack remove {name}",
            )


def check_name(name: str) -> None:
    """Raises AdapterError if an adapter cannot have this name."""
    if not VALID_NAME.fullmatch(name):
        raise AdapterError(
            "invalid adapter name", got=repr(name), fix="use letters, digits, '.', '_' and '-', at most 64"
        )


def _entry(name: str) -> Path:
    check_name(name)
    return _rack() / f"{name}.json"


def _registered_folder(name: str) -> Path | None:
    """The folder registered under a name, whether it exists or not; None if the name is not registered."""
    try:
        return Path(str(read_json_object(_entry(name)).get("folder"))).resolve()
    except AdapterError:
        return None


def names() -> list[str]:
    """All names on the rack, sorted."""
    return sorted(path.stem for path in _rack().glob("*.json")) if _rack().is_dir() else []


def _require_folder(name: str) -> Path:
    """The folder registered under a name. Raises AdapterError if there is none."""
    if not _entry(name).exists():
        find_adapter(name)  # raises with the nearest name
        raise AdapterError("this is a folder, not a name on the rack", got=name, fix="hatrack list shows the names")
    return Path(str(read_json_object(_entry(name)).get("folder")))


def _describe(name: str) -> RegisteredAdapter:
    folder, config, card = Path("?"), None, None
    try:
        folder = _require_folder(name)
        config = read_json_object(folder / CONFIG)
        card = read_card(folder)
    except AdapterError:
        return RegisteredAdapter(name, folder, "", "", 0, "", "", missing=True)
    base = card.base["source"] if card else str(config.get("base_model_name_or_path") or "?")
    task = card.task if card else str(config.get("task_type"))
    created = card.created if card else ""
    return RegisteredAdapter(name, folder, base, task, folder_size(folder), _metric(card), created, missing=False)


def _metric(card: AdapterCard | None) -> str:
    """The score to list: `accuracy 0.795`, `perplexity 12.300`."""
    after: dict[str, Any] = (card.metrics.get("after") or {}) if card else {}
    name = next((name for name in ("accuracy", "perplexity") if isinstance(after.get(name), int | float)), None)
    return f"{name} {after[name]:.3f}" if name else ""
