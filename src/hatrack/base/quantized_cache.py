"""Caches bases in 4 or 8 bits on disk: later runs load them in seconds, without the memory for full weights.

Each base has a folder, named by a hash of what its weights depend on; `about.json` lists that: the base, the bits, the
dtype, the versions. `model.safetensors` has the quantized model's weights under transformers' names, without those that
are made for a task. A folder appears whole or not at all, and is used only if its weights are as they were written:
they are checked like a base's fingerprint, read whole up to 512 MiB, else by samples.

Needs no torch: `load.py` quantizes and loads.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hatrack import storage
from hatrack.base.description import BaseDescription
from hatrack.base.fingerprint import fingerprint, tensors_digest
from hatrack.base.free_memory import check_bitsandbytes
from hatrack.base.header import INDEX, POOLERS, WEIGHTS, head_modules, parameter_count, read_tensors
from hatrack.console import format_size, say, say_once
from hatrack.errors import MachineError, ModelError
from hatrack.storage import ABOUT, CacheEntry, cache_dir, in_use, new_folder, read_about, remove_unused

FORMAT = 1
DIGITS = 16
BITS = {"4bit": 4, "8bit": 8}
"""Bits per weight, without scales."""


def root() -> Path:
    """The folder of all cached bases."""
    return cache_dir("packed")


def list_entries() -> list[CacheEntry]:
    """Every cached base, most recently used first, damaged ones included."""
    return storage.list_entries(root())


def remove_entry(entry: CacheEntry) -> bool:
    """Removes a cached base, unless a run is writing or opening it; a run that has it memory-mapped can go on."""
    return remove_unused(entry.folder)


def skipped_modules(config: Mapping[str, Any], task: str) -> list[str] | None:
    """The modules that are not quantized, by the ends of their names: a classifier's heads, which are trained, and its
    pooler, which may be fresh. None leaves it to transformers, which skips the output head."""
    pooler = POOLERS.get(str(config.get("model_type")))
    return [*head_modules(config), *([pooler] if pooler else [])] if task == "classify" else None


def cache_key(base: BaseDescription, *, task: str, quantize: str, dtype: str, device: str) -> dict[str, Any]:
    """What the quantized weights of a base depend on. `dtype`: that of the other weights and of the matmuls. `device`:
    the kind of device (cpu, cuda) that quantizes.

    Raises RecipeError if bitsandbytes is not installed, ModelError if the base cannot be read.
    """
    check_bitsandbytes(quantize)
    return {
        "format": FORMAT,
        "fingerprint": fingerprint(base),
        "config": hashlib.sha256(json.dumps(base.config, sort_keys=True).encode()).hexdigest()[:DIGITS],
        "task": "classify" if task == "classify" else "generate",
        "skipped": skipped_modules(base.config, task),
        "quantize": quantize,
        "dtype": dtype,
        "device": device,
        "versions": {name: version(name) for name in ("bitsandbytes", "torch", "transformers")},
    }


def is_cached(about: Mapping[str, Any]) -> bool:
    """Whether a base is cached, damaged or not."""
    with contextlib.suppress(OSError, MachineError):
        return (_folder(about) / ABOUT).is_file()
    return False


def find_cached(about: Mapping[str, Any]) -> Path | None:
    """The folder of a cached base; None if there is none. A damaged folder is reported and removed."""
    try:
        folder = _folder(about)
        if not folder.exists():
            return None
        if _is_intact(folder, about):
            with contextlib.suppress(OSError):
                os.utime(folder / ABOUT)
            return folder
    except (OSError, MachineError):
        return None
    say(f"the quantized base in {folder} is damaged: it is not used")
    shutil.rmtree(folder, ignore_errors=True)
    return None


def has_disk_space(base: BaseDescription, quantize: str) -> bool:
    """Whether the disk seems to have room for the quantized base; reports once if not."""
    least = parameter_count({n: info.shape for n, info in base.tensors.items()}) * BITS[quantize] // 8
    try:
        folder, free = root(), shutil.disk_usage(root()).free
    except (OSError, MachineError) as error:
        return _say_not_cached(str(error))
    if not os.access(folder, os.W_OK):
        return _say_not_cached(f"writing to {folder} is not allowed")
    return free > least or _say_not_cached(
        f"{folder} has {format_size(free)} left, and more than {format_size(least)} are needed"
    )


def write_cached(about: Mapping[str, Any], source: str, write: Callable[[Path], None]) -> Path | None:
    """Caches the weights: `write` gets the path of the safetensors file to write. `source`: the base's name.

    Returns the folder; None if that fails, which is reported once.
    """
    try:
        with new_folder(_folder(about)) as working:
            write(working / WEIGHTS)
            content = {**about, "base": source, "weights": tensors_digest(read_tensors(working))}
            (working / ABOUT).write_text(json.dumps(content, indent=2))
    except (OSError, MachineError) as error:
        _say_not_cached(str(error))
        return None
    return find_cached(about)


@contextlib.contextmanager
def folder_to_load(cached: Path, base: Path) -> Iterator[Path]:
    """A folder for transformers to load from while the block runs: the weights in `cached`, all else from `base`."""
    with tempfile.TemporaryDirectory(prefix="hatrack-") as name, in_use(cached):
        folder = Path(name)
        for file in base.iterdir():
            if file.name not in (WEIGHTS, INDEX):
                _link(folder / file.name, file)
        _link(folder / WEIGHTS, cached / WEIGHTS)
        yield folder


def _link(path: Path, target: Path) -> None:
    try:
        path.symlink_to(target.resolve())
    except OSError:  # Windows allows links to administrators only
        shutil.copyfile(target, path)


def _folder(about: Mapping[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return root() / key[:DIGITS]


def _is_intact(folder: Path, about: Mapping[str, Any]) -> bool:
    written = read_about(folder) or {}
    try:
        return {name: written.get(name) for name in about} == about and written.get("weights") == tensors_digest(
            read_tensors(folder)
        )
    except ModelError:
        return False


def _say_not_cached(why: str) -> bool:
    """Says once why a base is not cached. Always False."""
    say_once(f"the quantized base is not cached, but quantized at each load: {why}")
    return False
