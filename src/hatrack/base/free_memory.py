"""Free memory: measures it, tells whether a base fits in it, and releases unused memory.

Knows no torch and reads no weights.
"""

import ctypes
import gc
import importlib.util
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import psutil

from hatrack.base.header import TensorInfo
from hatrack.console import format_size
from hatrack.errors import RecipeError

OVERHEAD = 640 * 2**20
"""Bytes that inference needs besides the base: torch itself, an adapter, a few rows."""


def fits_in_memory(header: Mapping[str, TensorInfo], dtype: str, free: int, limit: int | None) -> bool:
    """Whether a base in `dtype` fits in the `free` bytes, and in `limit` bytes if there is a limit."""
    weights = sum(math.prod(info.shape) for info in header.values()) * (4 if dtype == "float32" else 2)
    return weights <= free and (limit is None or weights + OVERHEAD <= limit)


def available_memory(root: Path = Path("/")) -> tuple[int, str]:
    """Bytes a process can still allocate, and what sets the limit: the system, or a control group (version 1 or 2).

    A group has its limit minus its used memory left; cached files that can be dropped do not count as used. `root`:
    the root of the file system.
    """
    found = [(psutil.virtual_memory().available, "free on this machine")]
    for group in _control_groups(root):
        for limit_file, used_file, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _read_number(group / limit_file), _read_number(group / used_file)
            if limit is None or limit >= 2**60:
                continue
            droppable = _memory_stat(group / "memory.stat").get(cached, 0)
            left = max(0, limit - max(0, (used or 0) - droppable))
            found.append((left, f"left of the control group's {format_size(limit)}"))
    return min(found)


def missing_device_error(asked: str, available: Sequence[str]) -> RecipeError:
    """The error for a device that this machine does not have."""
    return RecipeError(
        f"--device {asked} is not in this machine", got=", ".join(available), fix=f"use --device {available[0]}"
    )


def check_bitsandbytes(quantize: str) -> None:
    """Raises RecipeError if a base is to be quantized and bitsandbytes is not installed."""
    if quantize != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(f"--quantize {quantize} needs bitsandbytes", fix="pip install 'hatrack[quantize]'")


def resident_bytes() -> int:
    """Resident bytes of this process."""
    return int(psutil.Process().memory_info().rss)


def release_memory() -> None:
    """Collects garbage, which takes half a second, and returns free memory to the system."""
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Returns free heap memory to the system, if glibc can."""
    found = getattr(ctypes.CDLL(None), "malloc_trim", None) if platform.system() == "Linux" else None
    if found is not None:
        found(0)


def _control_groups(root: Path) -> list[Path]:
    """The folders of this process's memory control groups (version 1 and 2) and of their parents."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        group = PurePosixPath(path)
        folders += [mount / part.relative_to("/") for part in (group, *group.parents)]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def _read_number(file: Path) -> int | None:
    """The number in a file; None for `max` or an unreadable file."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _memory_stat(file: Path) -> dict[str, int]:
    try:
        pairs = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
