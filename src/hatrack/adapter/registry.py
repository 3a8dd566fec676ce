"""The rack: names for the adapters on this machine. One small file a name, and one writer at a time.

It lies in `$HATRACK_HOME/rack` (default `~/.hatrack/rack`). Knows nothing of weights.
"""

import contextlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hatrack.adapter.card import (
    CONFIG,
    NAME,
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
from hatrack.storage import folder_size, locked, machine_errors, write_file


@dataclass(frozen=True)
class RegisteredAdapter:
    """One adapter on the rack. `size` in bytes; `missing` where its folder is gone or damaged."""

    name: str
    folder: Path
    base: str
    task: str
    size: int
    metric: str
    created: str
    missing: bool


def register(name: str, folder: Path, *, replace: bool = False) -> None:
    """Puts an adapter's folder on the rack. Raises AdapterError where another folder has the name, unless `replace`."""
    with _writing():
        _register(name, folder, replace=replace)


def check_free(name: str, folder: Path, *, replace: bool = False) -> None:
    """Raises AdapterError where the name is no name, or another adapter has it (unless `replace`); MachineError where
    nothing could be hung up."""
    with _writing():
        _check_free(name, folder, replace=replace)


def find_adapter(adapter: str | Path) -> Path:
    """The folder of an adapter: a path to one, or a name on the rack. Raises AdapterError where it is neither."""
    path = Path(adapter).expanduser()
    if (path / CONFIG).is_file():
        return path
    name = str(adapter)
    if NAME.fullmatch(name) and _pointer(name).exists():
        folder = Path(str(read_json_object(_pointer(name)).get("folder")))
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
    """Everything on the rack, by name."""
    return [_describe(name) for name in names()]


def registered_name(adapter: str | Path, folder: Path) -> str:
    """An adapter's name, the same everywhere: on the rack the one it was asked for by, or the one its `folder` hangs
    under; else the one in its hatrack.json, else its folder's."""
    if NAME.fullmatch(str(adapter)) and _target(str(adapter)) == folder.resolve():
        return str(adapter)
    hat = read_card(folder)
    own = valid_name(hat.name if hat and hat.name else folder.resolve().name)
    on_rack = [name for name in names() if _target(name) == folder.resolve()]
    return own if own in on_rack or not on_rack else on_rack[0]


def rename(old: str, new: str) -> None:
    """Gives an adapter another name, on the rack and in its hatrack.json and card; its folder stays.

    Raises AdapterError where `new` is taken.
    """
    with _writing():
        folder = _folder(old)
        if _pointer(new).exists():
            raise AdapterError(f"the name {new} is taken on the rack", got=_folder(new), fix="choose another one")
        _register(new, folder)
        _pointer(old).unlink(missing_ok=True)
    try:
        rename_in_files(folder, new)
    except HatrackError as error:
        say(f"the name in its files stays: {error}")


def unregister(name: str, *, delete_files: bool = False) -> None:
    """Takes a name off the rack; with `delete_files` its folder goes as well, if it is an adapter's."""
    with _writing():
        folder = _folder(name)
        if delete_files and (folder / CONFIG).is_file():
            with machine_errors(folder):
                shutil.rmtree(folder)
        _pointer(name).unlink(missing_ok=True)


def _rack() -> Path:
    return Path(os.environ.get("HATRACK_HOME") or Path.home() / ".hatrack").expanduser() / "rack"


def _writing() -> contextlib.AbstractContextManager[None]:
    """One writer at a time: between a look at who has a name and taking it, nobody else may take it."""
    return locked(_rack() / ".lock")


def _register(name: str, folder: Path, *, replace: bool = False) -> None:
    _check_free(name, folder, replace=replace)
    write_file(_pointer(name), json.dumps({"folder": str(folder.resolve())}) + "\n")


def _check_free(name: str, folder: Path, *, replace: bool = False) -> None:
    pointer = _pointer(name)
    if pointer.exists() and not replace:
        other = Path(str(read_json_object(pointer).get("folder")))
        if other != folder.resolve() and (other / CONFIG).exists():
            raise AdapterError(
                f"the name {name} is taken on the rack",
                got=other,
                fix=f"choose another --name, or hatrack remove {name}",
            )


def check_name(name: str) -> None:
    """Raises AdapterError where an adapter may not be called that."""
    if not NAME.fullmatch(name):
        raise AdapterError(
            "that is no name for an adapter", got=repr(name), fix="use letters, digits, '.', '_' and '-', at most 64"
        )


def _pointer(name: str) -> Path:
    check_name(name)
    return _rack() / f"{name}.json"


def _target(name: str) -> Path | None:
    """The folder that a name on the rack points to, there or not; None where nothing hangs under it."""
    try:
        return Path(str(read_json_object(_pointer(name)).get("folder"))).resolve()
    except AdapterError:
        return None


def names() -> list[str]:
    """Every name on the rack, in order."""
    return sorted(path.stem for path in _rack().glob("*.json")) if _rack().is_dir() else []


def _folder(name: str) -> Path:
    if not _pointer(name).exists():
        find_adapter(name)  # says what is nearest
        raise AdapterError("that is a folder, not a name on the rack", got=name, fix="hatrack list shows the names")
    return Path(str(read_json_object(_pointer(name)).get("folder")))


def _describe(name: str) -> RegisteredAdapter:
    folder, config, hat = Path("?"), None, None
    try:
        folder = _folder(name)
        config = read_json_object(folder / CONFIG)
        hat = read_card(folder)
    except AdapterError:
        return RegisteredAdapter(name, folder, "", "", 0, "", "", missing=True)
    base = hat.base["source"] if hat else str(config.get("base_model_name_or_path") or "?")
    task = hat.task if hat else str(config.get("task_type"))
    return RegisteredAdapter(
        name, folder, base, task, folder_size(folder), _metric(hat), hat.created if hat else "", missing=False
    )


def _metric(hat: AdapterCard | None) -> str:
    """The figure that says how good it is: `accuracy 0.795`, `perplexity 12.3`."""
    after: dict[str, Any] = (hat.metrics.get("after") or {}) if hat else {}
    name = next((name for name in ("accuracy", "perplexity") if isinstance(after.get(name), int | float)), None)
    return f"{name} {after[name]:.3f}" if name else ""
