"""Measures a run's peak memory, seconds of training, and bytes read from disk.

Memory is the process's peak resident memory, mapped pages included; on an accelerator, torch's peak allocation.
Knows nothing of how a run trains.
"""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from hatrack.console import format_size
from hatrack.planning.fit import Plan

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]

STATUS, CLEAR, IO = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/self/io")


@dataclass(frozen=True)
class CostMeter:
    """Measures a run's cost since `start_cost_meter`. `bytes_read_before`: bytes the process had read until then."""

    bytes_read_before: int

    def measure(self, seconds: float) -> dict[str, Any]:
        """Returns the cost so far: `peak_memory_bytes`, `bytes_read` from disk, and the given `seconds` of training."""
        return {
            "peak_memory_bytes": peak_memory(),
            "seconds": round(seconds, 3),
            "bytes_read": max(0, _bytes_read() - self.bytes_read_before),
        }


def start_cost_meter() -> CostMeter:
    """Starts to measure. Resets this process's peak memory if the system supports it (Linux)."""
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")
    return CostMeter(_bytes_read())


def compare_with_plan(plan: Plan, cost: dict[str, Any]) -> str:
    """Formats a line that compares what `CostMeter.measure` returned with the plan."""
    peak = cost["peak_memory_bytes"]
    planned_seconds = "" if plan.seconds is None else f" (planned {plan.seconds:,.1f})"
    parts = [
        f"peak memory {format_size(peak)} (planned {format_size(plan.peak_memory_bytes)})",
        f"{cost['seconds']:,.1f} s of training{planned_seconds}",
        f"{format_size(cost['bytes_read'])} read from disk",
    ]
    return "took: " + ", ".join(parts)


def peak_memory() -> int:
    """This process's peak memory in bytes: on the accelerator if it uses one, else resident.

    Read from VmHWM, because getrusage includes what the parent process held when it started this one.
    """
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    try:
        return int(next(line.split()[1] for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))) * 1024
    except (OSError, StopIteration):
        return _peak_resident()


def _peak_resident() -> int:
    """This process's peak memory without VmHWM: on macOS, Windows, and Linux without /proc."""
    if resource is None:
        return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _bytes_read() -> int:
    """Bytes that this process has read from a disk; 0 if the system does not count them."""
    try:
        return int(next(line.split()[1] for line in IO.read_text().splitlines() if line.startswith("read_bytes")))
    except (OSError, StopIteration):
        return 0
