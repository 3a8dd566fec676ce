"""What a run is expected to take, before it loads its base, and what it took in the end.

Memory is the most that the process holds resident, anonymous and mapped pages together; on an accelerator, what torch
allocates there. Knows nothing of how a run trains.
"""

import contextlib
import dataclasses
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from hatrack.base.description import BaseDescription
from hatrack.base.free_memory import resident_bytes, trim_heap
from hatrack.base.load import dtype_name, free_memory
from hatrack.base.quantized_cache import cache_key, is_cached
from hatrack.console import format_size, say
from hatrack.data.examples import Examples
from hatrack.data.tokens import Tokens
from hatrack.planning import fit
from hatrack.planning.fit import Plan, PlanRequest, Workload
from hatrack.planning.machine import Machine, this_machine
from hatrack.planning.schedule import Schedule
from hatrack.recipe import Recipe

STATUS, CLEAR, IO = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/self/io")


def plan(
    recipe: Recipe,
    files: BaseDescription,
    examples: Examples,
    tokens: Tokens,
    device: torch.device,
    dtype: torch.dtype,
    known: float = 0.0,
    micro_batch: int | None = None,
) -> tuple[Plan, Schedule]:
    """The plan of a run and the schedule that follows from it; `micro_batch` is that of an interrupted run, `known` the
    share of rows whose way through the layers below the adapters is kept.

    Raises RecipeError where the run does not fit this machine's memory, unless the recipe says `force`.
    """
    trim_heap()  # what reading and tokenising took for a moment is not held
    work = Workload(
        task=examples.task,
        labels=len(examples.labels),
        rows=tokens.train.sizes,
        held_out=tokens.held_out.sizes,
        process_bytes=None if device.type == "cuda" else resident_bytes(),
        cached_fraction=known,
        quantized_cached=_is_packed(recipe, files, examples.task, device, dtype),
    )
    where, found = fit.plan_or_raise(recipe, files, work, _machine(device, dtype), micro_batch)
    if not found.fits:
        say(
            f"this does not fit: {format_size(found.peak_memory_bytes)} for {format_size(where.limit)}; "
            "started all the same"
        )
    return found, _tell(where, found)


def _is_packed(recipe: Recipe, files: BaseDescription, task: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the base was quantised by an earlier run, and kept."""
    if recipe.quantize == "none":
        return False
    return is_cached(cache_key(files, task=task, quantize=recipe.quantize, dtype=dtype_name(dtype), device=device.type))


def _tell(where: PlanRequest, found: Plan) -> Schedule:
    """Says what was derived, and what the run will take."""
    schedule, work = where.schedule(found.micro_batch), where.work
    if schedule.reasons:
        say(f"derived: {', '.join(schedule.reasons)}")
    accumulation = f" ({schedule.micro_batch} at a time, to fit)" if schedule.accumulation > 1 else ""
    say(
        f"{len(work.rows):,} rows to learn from, {len(work.held_out):,} held out; "
        f"{schedule.steps:,} steps of {schedule.batch_size} rows{accumulation}"
    )
    if found.method.checkpointing:
        say("activations are computed again in the backward pass, to fit")
    rate = "the rate that is measured below" if where.recipe.lr == "auto" else f"{schedule.lr:g}"
    warmup = schedule.warmup_steps
    rise = f"up to {rate} in {warmup} step{'s' * (warmup > 1)}, then" if warmup else f"{rate}, then"
    say(f"learning rate: {rise} linear decay to 0")
    price = where.machine.speed
    measured = found.seconds is not None and price is not None and price.source == "probe"
    time = f", about {found.seconds:,.0f} s of training" if measured else ""
    say(f"expected peak memory: {format_size(found.peak_memory_bytes)}{time}")
    return schedule


def _machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """This machine, as its memory is at this moment."""
    name = dtype_name(dtype)
    found = dataclasses.replace(this_machine("auto" if device.type == "cuda" else "cpu", name), dtype=name)
    if device.type == "cuda":
        return dataclasses.replace(found, memory=free_memory(device), accelerator=True)
    if device.type == "cpu":
        return found
    return dataclasses.replace(found, accelerator=True, speed=None, can_stream=device.type != "mps")


@dataclasses.dataclass(frozen=True)
class Meter:
    """What was counted when a run began."""

    read: int

    def cost(self, seconds: float) -> dict[str, Any]:
        """What the run took since: `peak_memory_bytes`, `bytes_read` from disk, and the `seconds` of its training."""
        return {
            "peak_memory_bytes": peak_memory(),
            "seconds": round(seconds, 3),
            "bytes_read": max(0, _bytes_read() - self.read),
        }


def start_meter() -> Meter:
    """Begins to count; the most that the process held before is forgotten, where the system can forget it."""
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")
    return Meter(_bytes_read())


def against(found: Plan, cost: dict[str, Any]) -> str:
    """Plan and cost beside each other, in one line."""
    peak = cost["peak_memory_bytes"]
    parts = [f"peak memory {format_size(peak)} (planned {format_size(found.peak_memory_bytes)})"]
    seconds = f"{cost['seconds']:,.1f} s of training"
    parts.append(seconds + (f" (planned {found.seconds:,.1f})" if found.seconds is not None else ""))
    parts.append(f"{format_size(cost['bytes_read'])} read from disk")
    return "took: " + ", ".join(parts)


def peak_memory() -> int:
    """The most memory this process has held, in bytes: on the accelerator if it has one, else resident.

    From VmHWM: what getrusage tells of a process begins with what its parent held when it was started.
    """
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    try:
        return int(next(line.split()[1] for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))) * 1024
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _bytes_read() -> int:
    """Bytes this process has caused to be read from a disk."""
    try:
        return int(next(line.split()[1] for line in IO.read_text().splitlines() if line.startswith("read_bytes")))
    except (OSError, StopIteration):
        return 0
