"""Plans a run: the largest micro-batch that fits a machine, or the one change that makes it fit.

Imports no torch and reads no weights: the safetensors headers and config of the base, the lengths of the rows and the
machine are enough.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hatrack import cpu
from hatrack.base.description import BaseDescription
from hatrack.console import format_size
from hatrack.data.order import epoch_batches, scoring_batches
from hatrack.errors import RecipeError
from hatrack.planning.machine import Machine
from hatrack.planning.memory import (
    BITSANDBYTES_IMPORTED,
    FRAMEWORK,
    ITEM_BYTES,
    STATES_IN_MEMORY,
    MemoryRequest,
    Method,
    MicroBatch,
    base_bytes,
    streamed_state_bytes,
    training_bytes,
)
from hatrack.planning.model_shape import ModelShape, describe_model
from hatrack.planning.schedule import Schedule, batch_rows, derive
from hatrack.planning.time import MachineSpeed, OpCounts, forward_counts, frozen_prefix_counts, step_counts
from hatrack.recipe import Recipe

METHODS = {
    "full": Method(full=True),
    "LoRA": Method(),
    "LoRA, 8-bit base": Method(quantize="8bit"),
    "LoRA, 4-bit base": Method(quantize="4bit"),
    "LoRA, streamed": Method(streamed=True),
}
"""Training methods compared in `hatrack plan`, one column each."""
MAX_PLANNED_ROWS = 20_000
"""Larger data sets are subsampled to this many rows, evenly over length."""
MIN_SCORED_ROWS = 8
"""Minimum batch size for scoring held-out rows."""
SETUP_FRACTION, SAVE_FRACTION = 0.05, 0.02
"""Time to set up the trainer, and to save a checkpoint, as fractions of the process start-up time."""
COMMAND_LINE_MAX_RATIO = 1.05
"""A process with at most this many times the memory of hatrack's imports is taken to be the command line; then only the
imports are counted, so that `plan` and `train` agree. For scripts and notebooks all of their memory is counted."""
USABLE_MEMORY_FRACTION = 0.95
"""Fraction of the available memory that a plan may use; the rest is left to the system."""
CHECKPOINTS_LEFT = 3
"""Checkpoints of a run on disk: the two newest and that of the best epoch. A fourth exists while it is written."""
CHECKPOINT_COPIES = 3
"""A checkpoint has this many times the adapter's bytes: its weights and the optimizer's two moments."""


@dataclass(frozen=True)
class Workload:
    """The sizes of the rows of a run, and what is already in memory and in the caches.

    `row_sizes` (of the training rows) and `held_out_sizes`: (n, 2), token count and supervised-token count (0 if
    the task is classify). `process_bytes`: resident bytes of the process, None if it has yet to start.
    `cached_fraction`: the fraction of rows whose hidden states below the adapters are cached. `quantized_cached`:
    whether the quantized base is cached.
    """

    task: str
    labels: int
    row_sizes: np.ndarray
    held_out_sizes: np.ndarray
    process_bytes: int | None = None
    cached_fraction: float = 0.0
    quantized_cached: bool = False

    @property
    def longest(self) -> int:
        """Tokens of the longest training row."""
        return int(self.row_sizes[:, 0].max())


@dataclass(frozen=True)
class Plan:
    """The expected memory, time and disk space of a run. `memory` is in bytes by component, for this `micro_batch`.

    `limit` is the available memory in bytes, None without a limit. `seconds` is the training time (as in `train
    --json`), `whole_seconds` that of the whole process, start-up, loading and verification included; both are None if
    the machine's speed is unknown. `read_per_step`: bytes read from disk in each step after the first. `disk`: bytes on
    disk by content.
    """

    trainable: int
    total: int
    micro_batch: int
    memory: dict[str, int]
    method: Method = dataclasses.field(default_factory=Method)
    limit: int | None = None
    seconds: float | None = None
    whole_seconds: float | None = None
    step_seconds: float | None = None
    read_per_step: int = 0
    disk: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def peak_memory_bytes(self) -> int:
        """The sum of all components."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the required memory is within the limit."""
        return self.limit is None or required_bytes(self.memory) <= self.limit

    def as_json(self) -> dict[str, Any]:
        """The plan as `train --json` and `plan --json` print it."""
        return {
            "trainable": self.trainable,
            "total": self.total,
            "micro_batch": self.micro_batch,
            "checkpointing": self.method.checkpointing,
            "fits": self.fits,
            "limit_bytes": self.limit,
            "peak_memory_bytes": self.peak_memory_bytes,
            "memory": dict(self.memory),
            "disk": dict(self.disk),
            "bytes_read_per_step": self.read_per_step,
            "seconds": _round(self.seconds),
            "seconds_per_step": _round(self.step_seconds),
            "whole_seconds": _round(self.whole_seconds),
        }


def required_bytes(memory: Mapping[str, int]) -> int:
    """The sum of all components but `loading`, the file pages that are read only while loading: the kernel drops them
    when it needs memory."""
    return sum(memory.values()) - memory.get("loading", 0)


@dataclass(frozen=True)
class PlanRequest:
    """What a plan depends on: the recipe, the base with its adapter, the rows and the machine."""

    recipe: Recipe
    model: ModelShape
    work: Workload
    machine: Machine

    @property
    def dtype(self) -> str:
        """The dtype of the base."""
        return self.machine.dtype if self.recipe.dtype == "auto" else self.recipe.dtype

    @property
    def limit(self) -> int:
        """Bytes the run may take: `--memory`, but never more than is available."""
        available = int(self.machine.memory * USABLE_MEMORY_FRACTION) + (self.work.process_bytes or 0)
        return min(available, self.recipe.memory or available)

    @property
    def batch_size(self) -> int:
        """Rows per step."""
        return batch_rows(self.recipe, task=self.work.task, rows=len(self.work.row_sizes))

    def schedule(self, micro_batch: int) -> Schedule:
        """The schedule for this micro-batch size."""
        return derive(
            self.recipe,
            task=self.work.task,
            rows=len(self.work.row_sizes),
            hidden_size=self.model.dims.hidden,
            micro_batch=micro_batch,
        )


def make_request(recipe: Recipe, base: BaseDescription, work: Workload, machine: Machine) -> PlanRequest:
    """The request for a plan of `recipe`. Raises TargetError or RecipeError if the recipe does not fit the base."""
    return PlanRequest(recipe, describe_model(base, recipe, task=work.task, labels=work.labels), work, machine)


def plan_or_raise(
    recipe: Recipe, base: BaseDescription, work: Workload, machine: Machine, micro_batch: int | None = None
) -> tuple[PlanRequest, Plan]:
    """The plan that training follows. A resumed run gives the `micro_batch` it had before.

    Raises RecipeError if the run does not fit, unless the recipe says `force`; TargetError as `make_request` does.
    """
    request = make_request(recipe, base, work, machine)
    found = choose_plan(request, micro_batch)
    if not found.fits and not recipe.force:
        raise too_large_error(request, found)
    return request, found


def choose_plan(request: PlanRequest, micro_batch: int | None = None) -> Plan:
    """The plan by the recipe's own method if that fits; else with a streamed base, if that is possible and fits."""
    found = plan_run(request, None, micro_batch)
    if not found.fits and not _option_blocking_streaming(request):
        streamed = plan_run(request, Method(streamed=True), micro_batch)
        found = streamed if streamed.fits else found
    return found


def _option_blocking_streaming(request: PlanRequest) -> str | None:
    """The first option that prevents streaming the base layer by layer; None if none does."""
    recipe = request.recipe
    options = {"quantize": recipe.quantize != "none", "variant": recipe.variant in ("dora", "pissa")}
    options |= {"lr": recipe.lr == "auto", "layers": recipe.layers == "auto", "device": not request.machine.can_stream}
    return next((name for name, prevents in options.items() if prevents), None)


def plan_run(request: PlanRequest, method: Method | None = None, micro_batch: int | None = None) -> Plan:
    """The plan by one method, by default the recipe's, with this `micro_batch`, by default the largest that fits.

    Falls back to activation checkpointing if a micro-batch of 1 does not fit; if that fails too, `plan.fits` is False.
    """
    method = method or Method(quantize=request.recipe.quantize)
    tries = [method] if method.streamed else [method, dataclasses.replace(method, checkpointing=True)]
    for tried in tries:
        memory_for = functools.partial(_memory_for, request, tried)
        if micro_batch:
            size, memory = micro_batch, memory_for(micro_batch)
        else:
            size, memory = largest_micro_batch(memory_for, request.batch_size, request.limit)
        if required_bytes(memory) <= request.limit:
            break
    total = request.model.counts.total
    return _with_costs(request, Plan(_trainable(request, tried), total, size, memory, tried, request.limit))


def largest_micro_batch(
    memory_for: Callable[[int], dict[str, int]], batch_size: int, limit: int
) -> tuple[int, dict[str, int]]:
    """The largest divisor of the batch size that needs at most `limit` bytes, else 1; and its bytes by component."""
    for size in range(batch_size, 0, -1):
        if batch_size % size == 0:
            memory = memory_for(size)
            if required_bytes(memory) <= limit or size == 1:
                return size, memory
    raise ValueError("a batch has at least one row")


def suggest_change(request: PlanRequest, plan: Plan) -> str | None:
    """The change of options that makes the run fit and alters its result least; None if no single change does."""
    for words, recipe, method in _candidate_changes(request, plan):
        longest = recipe.max_length or np.iinfo(np.int64).max
        sizes = {
            "row_sizes": np.minimum(request.work.row_sizes, longest),
            "held_out_sizes": np.minimum(request.work.held_out_sizes, longest),
        }
        changed = dataclasses.replace(request, recipe=recipe, work=dataclasses.replace(request.work, **sizes))
        found = plan_run(changed, method)
        if found.fits:
            return f"{words} ({format_size(required_bytes(found.memory))})"
    return None


def too_large_error(request: PlanRequest, plan: Plan) -> RecipeError:
    """The error for a run that does not fit: what it needs, what is available, and what to change."""
    required, largest = required_bytes(plan.memory), max(plan.memory, key=lambda name: plan.memory[name])
    needed = f"{format_size(required)} needed, of which {largest} {format_size(plan.memory[largest])}"
    limit = f"--memory {format_size(request.limit)}"
    if request.recipe.memory is None or request.recipe.memory > request.limit:
        limit = f"{format_size(request.limit)} of memory ({request.machine.reason})"
    suggestion = suggest_change(request, plan)
    suggestion = suggestion or f"a smaller base, or a machine with {format_size(required / USABLE_MEMORY_FRACTION)}"
    return RecipeError(f"{limit} is too little even for one row at a time", got=needed, fix=f"{suggestion}; or --force")


def _candidate_changes(request: PlanRequest, plan: Plan) -> list[tuple[str, Recipe, Method]]:
    """The changes to try, in order: shorter rows first if activations need most of the memory, else a base that takes
    less memory (streamed or quantized) first."""
    method = plan.method
    shorter = []
    length = 1 << max(request.work.longest - 1, 1).bit_length() - 1  # the largest power of two below the longest row
    while length >= 32:
        shorter.append((f"--max-length {length}", request.recipe.changed(max_length=length), method))
        length //= 2
    quantized = [
        (f"--quantize {bits}", request.recipe.changed(quantize=bits), dataclasses.replace(method, quantize=bits))
        for bits in ("8bit", "4bit")
        if method.quantize == "none"
    ]
    options = ("--variant lora", "variant", "lora"), ("no --lr auto", "lr", None), ("--layers all", "layers", "all")
    streamed = [
        (
            f"{words}, and the base streamed layer by layer",
            request.recipe.changed(**{name: value}),
            Method(streamed=True),
        )
        for words, name, value in options
        if _option_blocking_streaming(request) == name
    ]
    activations = sum(plan.memory[name] for name in ("activations", "heap", "scoring"))
    if activations > plan.memory["weights"]:
        return [*shorter[:1], *streamed, *quantized, *shorter[1:]]
    return [*streamed, *quantized, *shorter]


def _trainable(request: PlanRequest, method: Method) -> int:
    """The number of trainable parameters."""
    counts = request.model.counts
    return counts.total - counts.lora - counts.head if method.full else counts.trainable


def _memory_for(request: PlanRequest, method: Method, micro_batch: int) -> dict[str, int]:
    """Bytes by component, for this micro-batch size."""
    work, machine = request.work, request.machine
    batches = micro_batches(request, micro_batch)
    largest = max(batches, key=lambda batch: batch.tokens)
    process = (machine.imported_bytes or FRAMEWORK) + (BITSANDBYTES_IMPORTED if method.quantize != "none" else 0)
    if (work.process_bytes or 0) > COMMAND_LINE_MAX_RATIO * process:  # a script or notebook
        process = work.process_bytes or 0
    all_cached = work.cached_fraction == 1 and _is_mapped(request, method) and not method.full and not method.streamed
    run = MemoryRequest(
        request.model,
        method,
        request.dtype,
        largest,
        step_tokens=largest.tokens * (request.batch_size // micro_batch),
        scored=max(scored_batches(request, micro_batch), key=lambda batch: batch.tokens, default=None),
        dropout=request.recipe.dropout,
        uses_fast_lora=method.quantize == "none" and request.recipe.variant != "dora",
        accelerator=machine.accelerator,
        caches_primitives=request.dtype == "bfloat16" and cpu.has_fast_bfloat16(),
        process_bytes=process,
        layers_not_read=request.model.frozen_prefix_layers if all_cached else 0,
        quantized_cached=work.quantized_cached,
    )
    return training_bytes(run)


def scored_batches(request: PlanRequest, micro_batch: int) -> list[MicroBatch]:
    """The batches in which held-out rows are scored, given the micro-batch size of training."""
    sample = _sample_rows(request.work.held_out_sizes)
    return _batches(sample, scoring_batches(sample[:, 0], max(micro_batch, MIN_SCORED_ROWS))) if len(sample) else []


def micro_batches(request: PlanRequest, micro_batch: int) -> list[MicroBatch]:
    """The training micro-batches of size `micro_batch`, from the first two epochs at most."""
    schedule, work = request.schedule(micro_batch), request.work
    sample = _sample_rows(work.row_sizes)
    wanted = schedule.steps * schedule.accumulation
    found: list[MicroBatch] = []
    for epoch in range(2):
        order = epoch_batches(sample[:, 0], micro_batch, request.recipe.seed, epoch, by_tokens=work.task != "classify")
        found += _batches(sample, order)
        if len(found) >= wanted:
            break
    return found[:wanted]


def _batches(sizes: np.ndarray, batches: Sequence[np.ndarray]) -> list[MicroBatch]:
    """Makes micro-batches out of all rows' sizes and each batch's row numbers."""
    return [MicroBatch(len(rows), int(sizes[rows, 0].max()), int(sizes[rows, 1].sum())) for rows in batches]


def _sample_rows(sizes: np.ndarray) -> np.ndarray:
    """The sizes of at most `MAX_PLANNED_ROWS` rows, evenly over length."""
    if len(sizes) <= MAX_PLANNED_ROWS:
        return sizes
    return sizes[np.argsort(sizes[:, 0])][:: -(-len(sizes) // MAX_PLANNED_ROWS)]


def _with_costs(request: PlanRequest, plan: Plan) -> Plan:
    """Adds bytes on disk, bytes read per step and seconds to a plan."""
    model, method, speed = request.model, plan.method, request.machine.speed
    disk = _disk_bytes(request, plan)
    skipped = _skipped_fraction(request, method, request.schedule(plan.micro_batch).epochs)
    read = _read_per_step(request, plan, disk.get("packed", model.disk_bytes), skipped)
    plan = dataclasses.replace(plan, disk=disk, read_per_step=read)
    return plan if speed is None else _with_seconds(request, plan, speed, skipped)


def _disk_bytes(request: PlanRequest, plan: Plan) -> dict[str, int]:
    """Bytes on disk by content, under the keys of `plan --json`."""
    model, method = request.model, plan.method
    adapter = (4 if not method.full else ITEM_BYTES[request.dtype]) * plan.trainable
    disk = {"base": model.disk_bytes, "adapter": adapter, "checkpoints": CHECKPOINTS_LEFT * CHECKPOINT_COPIES * adapter}
    if method.streamed:
        batches = micro_batches(request, plan.micro_batch)
        tokens = max(batch.tokens for batch in batches) * (request.batch_size // plan.micro_batch)
        disk["states"] = max(0, streamed_state_bytes(model, tokens, ITEM_BYTES[request.dtype]) - STATES_IN_MEMORY)
    cached = _cached_bytes(request, method)
    if cached:
        disk["kept"] = cached  # hidden states below the adapters
    if method.quantize != "none":
        disk["packed"] = base_bytes(model, method, request.dtype)  # the quantized base
    return disk


def _with_seconds(request: PlanRequest, plan: Plan, speed: MachineSpeed, skipped: float) -> Plan:
    """Adds seconds to a plan. The layers below the adapters are not computed for a fraction `skipped` of the rows."""
    model, method, compute = request.model, plan.method, request.recipe.compute
    schedule = request.schedule(plan.micro_batch)
    batches = micro_batches(request, plan.micro_batch)
    steps = [
        step_counts(model, method, batch) - frozen_prefix_counts(model, method, batch) * skipped for batch in batches
    ]
    training = sum(steps, OpCounts(0, 0, 0)) * (schedule.steps * schedule.accumulation / len(steps))
    update = OpCounts(0, 8.0 * plan.trainable, model.adapted_layers)  # clipping and the optimizer, once per step
    training += update * schedule.steps
    cached = _cached_fraction(request, method)  # the first evaluation computes what the later ones read
    scores = [
        forward_counts(model, batch) - frozen_prefix_counts(model, method, batch) * cached
        for batch in scored_batches(request, plan.micro_batch)
    ]
    held_out = request.work.held_out_sizes
    scoring = sum(scores, OpCounts(0, 0, 0)) * (len(held_out) / max(len(_sample_rows(held_out)), 1))
    saves = max(1, math.ceil(schedule.epochs))
    evaluations = saves + 1  # one per epoch, and one of the base
    read_seconds = plan.read_per_step * schedule.steps / speed.disk_bytes_per_second
    overhead_seconds = (SETUP_FRACTION + SAVE_FRACTION * saves) * speed.start_seconds
    scoring_seconds = evaluations * scoring.seconds(speed)
    seconds = training.seconds(speed, compute) + scoring_seconds + read_seconds + overhead_seconds
    whole = seconds + speed.start_seconds + 2 * model.disk_bytes / speed.disk_bytes_per_second
    per_step = training.seconds(speed, compute) / schedule.steps + plan.read_per_step / speed.disk_bytes_per_second
    return dataclasses.replace(plan, seconds=seconds, whole_seconds=whole, step_seconds=per_step)


def _read_per_step(request: PlanRequest, plan: Plan, base: int, skipped: float) -> int:
    """Bytes read from disk per step, for a base of `base` bytes: 0 if the base stays in memory.

    Streaming reads the base twice per step, but the layers below the adapters once, and not at all for the fraction
    `skipped` of the rows.
    """
    model, method = request.model, plan.method
    if method.streamed:
        below = model.matmul_weights * model.frozen_prefix_layers / max(model.dims.layers, 1)
        below_fraction = below / (model.matmul_weights + model.other_weights)
        return round(base * (2 - below_fraction * (1 + skipped)))
    accumulation = request.batch_size // plan.micro_batch
    return 2 * base * accumulation if _is_mapped(request, method) and not plan.fits else 0


def _is_mapped(request: PlanRequest, method: Method) -> bool:
    """Whether the base's weights are memory-mapped: from its own file, or from the cache of quantized bases."""
    same = request.model.stored_dtype == request.dtype or method.quantize != "none"
    return same and not request.machine.accelerator


def _cached_bytes(request: PlanRequest, method: Method) -> int:
    """Bytes on disk of the cached hidden states below the adapters: one per token, up to --cache-limit."""
    if method.full or not request.model.frozen_prefix_layers:
        return 0
    all_states = _all_states_bytes(request)
    return min(all_states, request.recipe.cache_limit or all_states)


def _all_states_bytes(request: PlanRequest) -> int:
    """Bytes of one hidden state for each token of all rows."""
    tokens = int(request.work.row_sizes[:, 0].sum() + request.work.held_out_sizes[:, 0].sum())
    return tokens * request.model.dims.hidden * ITEM_BYTES[request.dtype]


def _cached_fraction(request: PlanRequest, method: Method) -> float:
    """The fraction of rows whose hidden states below the adapters fit in the cache."""
    return _cached_bytes(request, method) / max(_all_states_bytes(request), 1)


def _skipped_fraction(request: PlanRequest, method: Method, epochs: float) -> float:
    """The fraction of rows, over all epochs, for which the layers below the adapters are not computed."""
    return _cached_fraction(request, method) * (1 - (1 - request.work.cached_fraction) / max(epochs, 1))


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
