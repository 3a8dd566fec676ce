"""Plans a run: the largest micro-batch that fits a machine, or the one change that makes it fit.

Imports no torch and reads no weights: the headers of the base, the lengths of the rows and the machine are enough.
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
from hatrack.planning.time import MachineSpeed, OpCounts, cached_counts, forward_counts, step_counts
from hatrack.recipe import Recipe

METHODS = {
    "full": Method(full=True),
    "LoRA": Method(),
    "LoRA, 8-bit base": Method(quantize="8bit"),
    "LoRA, 4-bit base": Method(quantize="4bit"),
    "LoRA, streamed": Method(streamed=True),
}
"""The columns of a plan."""
MAX_PLANNED_ROWS = 20_000
"""Of more rows, so many are planned with, evenly chosen by length."""
MIN_SCORED_ROWS = 8
"""Rows that are scored at a time, if a micro-batch has fewer."""
SET_UP, SAVE = 0.05, 0.02
"""Times to set up the trainer and to save a checkpoint, as shares of the time to start."""
COMMAND_MEMORY = 1.05
"""A process that holds up to so many times what imports take runs one of hatrack's commands, so that `plan` and `train`
give the same figure. Scripts and notebooks import more, which is counted."""
MARGIN = 0.95
"""Share of the available memory that is planned with: the system needs a little of it."""


@dataclass(frozen=True)
class Workload:
    """The rows of a run, and what it already has in memory and in the caches.

    `rows` (to train on) and `held_out`: (n, 2), the number of tokens of each row and how many of them are supervised (0
    to classify). `process_bytes`: what the process holds already, None if it has yet to start. `cached_fraction`: the
    share of rows whose hidden states below the adapters are cached. `quantized_cached`: the quantized base is cached.
    """

    task: str
    labels: int
    rows: np.ndarray
    held_out: np.ndarray
    process_bytes: int | None = None
    cached_fraction: float = 0.0
    quantized_cached: bool = False

    @property
    def longest(self) -> int:
        """Tokens of the longest row to train on."""
        return int(self.rows[:, 0].max())


@dataclass(frozen=True)
class Plan:
    """What a run is expected to take. `memory` is in bytes by term, for `micro_batch` rows at a time.

    `limit` is the available memory in bytes, None without a limit. `seconds` are those of training (as `train --json`
    counts them), `whole_seconds` those of the process; None if the machine's speed is unknown. `read_per_step` is bytes
    read from disk in a step after the first, `disk` is bytes on disk by what they are.
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
        """All terms together."""
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
    """All terms except pages of files that are read once while loading, which the system drops when it needs memory."""
    return sum(memory.values()) - memory.get("loading", 0)


@dataclass(frozen=True)
class PlanRequest:
    """All that a plan depends on: the recipe, the base with its adapter, the rows and the machine."""

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
        available = int(self.machine.memory * MARGIN) + (self.work.process_bytes or 0)
        return min(available, self.recipe.memory or available)

    @property
    def batch_size(self) -> int:
        """Rows of a step."""
        return batch_rows(self.recipe, task=self.work.task, rows=len(self.work.rows))

    def schedule(self, micro_batch: int) -> Schedule:
        """The schedule with `micro_batch` rows at a time."""
        return derive(
            self.recipe,
            task=self.work.task,
            rows=len(self.work.rows),
            hidden_size=self.model.dims.hidden,
            micro_batch=micro_batch,
        )


def make_request(recipe: Recipe, base: BaseDescription, work: Workload, machine: Machine) -> PlanRequest:
    """The request for a plan of `recipe`. Raises TargetError or RecipeError if the recipe does not fit the base."""
    return PlanRequest(recipe, describe_model(base, recipe, task=work.task, labels=work.labels), work, machine)


def plan_or_raise(
    recipe: Recipe, base: BaseDescription, work: Workload, machine: Machine, rows: int | None = None
) -> tuple[PlanRequest, Plan]:
    """The plan that training follows. A resumed run keeps its `rows` at a time.

    Raises RecipeError if the run does not fit, unless the recipe says `force`; TargetError as `make_request` does.
    """
    request = make_request(recipe, base, work, machine)
    found = choose_plan(request, rows)
    if not found.fits and not recipe.force:
        raise too_large_error(request, found)
    return request, found


def choose_plan(request: PlanRequest, rows: int | None = None) -> Plan:
    """The plan by the recipe's own method if that fits; else with a streamed base, if that is possible and fits."""
    found = plan_run(request, rows=rows)
    if not found.fits and not _option_against_streaming(request):
        streamed = plan_run(request, Method(streamed=True), rows)
        found = streamed if streamed.fits else found
    return found


def _option_against_streaming(request: PlanRequest) -> str | None:
    """The option with which the base cannot be streamed layer by layer; None if it can be."""
    recipe = request.recipe
    options = {"quantize": recipe.quantize != "none", "variant": recipe.variant in ("dora", "pissa")}
    options |= {"lr": recipe.lr == "auto", "layers": recipe.layers == "auto", "device": not request.machine.can_stream}
    return next((name for name, prevents in options.items() if prevents), None)


def plan_run(request: PlanRequest, method: Method | None = None, rows: int | None = None) -> Plan:
    """The plan by one method, by default the recipe's, with as many rows at a time as fit, or exactly `rows`.

    If not even one row fits, with activation checkpointing. If that does not fit either, `fits` of the plan is false.
    """
    method = method or Method(quantize=request.recipe.quantize)
    tries = [method] if method.streamed else [method, dataclasses.replace(method, checkpointing=True)]
    for tried in tries:
        memory_for = functools.partial(_memory_for, request, tried)
        if rows:
            micro_batch, memory = rows, memory_for(rows)
        else:
            micro_batch, memory = largest_micro_batch(memory_for, request.batch_size, request.limit)
        if required_bytes(memory) <= request.limit:
            break
    total = request.model.counts.total
    return _with_costs(request, Plan(_trainable(request, tried), total, micro_batch, memory, tried, request.limit))


def largest_micro_batch(
    memory_for: Callable[[int], dict[str, int]], batch_size: int, limit: int
) -> tuple[int, dict[str, int]]:
    """The most rows at a time that divide the batch and need at most `limit` bytes, else one; their bytes by term."""
    for rows in range(batch_size, 0, -1):
        if batch_size % rows == 0:
            memory = memory_for(rows)
            if required_bytes(memory) <= limit or rows == 1:
                return rows, memory
    raise ValueError("a batch has at least one row")


def suggest_change(request: PlanRequest, plan: Plan) -> str | None:
    """The change of options that makes the run fit and alters its result least; None if no single one does."""
    for words, recipe, method in _candidate_changes(request, plan):
        longest = recipe.max_length or np.iinfo(np.int64).max
        cut = {"rows": np.minimum(request.work.rows, longest), "held_out": np.minimum(request.work.held_out, longest)}
        other = dataclasses.replace(request, recipe=recipe, work=dataclasses.replace(request.work, **cut))
        found = plan_run(other, method)
        if found.fits:
            return f"{words} ({format_size(required_bytes(found.memory))})"
    return None


def too_large_error(request: PlanRequest, plan: Plan) -> RecipeError:
    """The error for a run that does not fit: what it needs, what is available, and what to change."""
    required, largest = required_bytes(plan.memory), max(plan.memory, key=lambda term: plan.memory[term])
    needed = f"{format_size(required)} needed, of which {largest} {format_size(plan.memory[largest])}"
    limit = f"--memory {format_size(request.limit)}"
    if request.recipe.memory is None or request.recipe.memory > request.limit:
        limit = f"{format_size(request.limit)} of memory ({request.machine.reason})"
    suggestion = suggest_change(request, plan)
    suggestion = suggestion or f"a smaller base, or a machine with {format_size(required / MARGIN)}"
    return RecipeError(f"{limit} is too little even for one row at a time", got=needed, fix=f"{suggestion}; or --force")


def _candidate_changes(request: PlanRequest, plan: Plan) -> list[tuple[str, Recipe, Method]]:
    """The changes to try, in order: shorter rows first if one row needs most of the memory, else fewer bits."""
    method = plan.method
    shorter = []
    length = 1 << max(request.work.longest - 1, 1).bit_length() - 1
    while length >= 32:
        shorter.append((f"--max-length {length}", request.recipe.changed(max_length=length), method))
        length //= 2
    fewer = [
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
        if _option_against_streaming(request) == name
    ]
    by_rows = sum(plan.memory[term] for term in ("activations", "heap", "scoring")) > plan.memory["weights"]
    return [*shorter[:1], *streamed, *fewer, *shorter[1:]] if by_rows else [*streamed, *fewer, *shorter]


def _trainable(request: PlanRequest, method: Method) -> int:
    """Trainable parameters."""
    counts = request.model.counts
    return counts.total - counts.lora - counts.head if method.full else counts.trainable


def _memory_for(request: PlanRequest, method: Method, rows: int) -> dict[str, int]:
    """Bytes by term, with `rows` at a time."""
    work, machine = request.work, request.machine
    batches = micro_batches(request, rows)
    largest = max(batches, key=lambda batch: batch.tokens)
    process = (machine.imported_bytes or FRAMEWORK) + (BITSANDBYTES_IMPORTED if method.quantize != "none" else 0)
    if (work.process_bytes or 0) > COMMAND_MEMORY * process:  # a process that does other things too
        process = work.process_bytes or 0
    all_cached = work.cached_fraction == 1 and _is_mapped(request, method) and not method.full and not method.streamed
    run = MemoryRequest(
        request.model,
        method,
        request.dtype,
        largest,
        step_tokens=largest.tokens * (request.batch_size // rows),
        scored=max(scored_batches(request, rows), key=lambda batch: batch.tokens, default=None),
        dropout=request.recipe.dropout,
        fast_layers=method.quantize == "none" and request.recipe.variant != "dora",
        accelerator=machine.accelerator,
        stored_matmuls=request.dtype == "bfloat16" and cpu.has_fast_bfloat16(),
        process_bytes=process,
        unread_layers=request.model.cached_layers if all_cached else 0,
        quantized_cached=work.quantized_cached,
    )
    return training_bytes(run)


def scored_batches(request: PlanRequest, rows: int) -> list[MicroBatch]:
    """The batches in which held-out rows are scored, with `rows` at a time in training."""
    thin = _sample_rows(request.work.held_out)
    return _batches(thin, scoring_batches(thin[:, 0], max(rows, MIN_SCORED_ROWS))) if len(thin) else []


def micro_batches(request: PlanRequest, rows: int) -> list[MicroBatch]:
    """The micro-batches of training with `rows` at a time, of its first two epochs at most."""
    schedule, work = request.schedule(rows), request.work
    thin = _sample_rows(work.rows)
    wanted = schedule.steps * schedule.accumulation
    found: list[MicroBatch] = []
    for epoch in range(2):
        order = epoch_batches(thin[:, 0], rows, request.recipe.seed, epoch, by_tokens=work.task != "classify")
        found += _batches(thin, order)
        if len(found) >= wanted:
            break
    return found[:wanted]


def _batches(rows: np.ndarray, order: Sequence[np.ndarray]) -> list[MicroBatch]:
    """Batches of rows, given by their indices."""
    return [MicroBatch(len(b), int(rows[b, 0].max()), int(rows[b, 1].sum())) for b in order]


def _sample_rows(rows: np.ndarray) -> np.ndarray:
    """`MAX_PLANNED_ROWS` of the rows at most, of all lengths."""
    if len(rows) <= MAX_PLANNED_ROWS:
        return rows
    return rows[np.argsort(rows[:, 0])][:: -(-len(rows) // MAX_PLANNED_ROWS)]


def _with_costs(request: PlanRequest, plan: Plan) -> Plan:
    """The plan with its bytes on disk, bytes read and seconds."""
    model, method, speed = request.model, plan.method, request.machine.speed
    disk = _disk_bytes(request, plan)
    skipped = _skipped_fraction(request, method, request.schedule(plan.micro_batch).epochs)
    read = _read_per_step(request, plan, disk.get("packed", model.disk_bytes), skipped)
    plan = dataclasses.replace(plan, disk=disk, read_per_step=read)
    return plan if speed is None else _with_seconds(request, plan, speed, skipped)


def _disk_bytes(request: PlanRequest, plan: Plan) -> dict[str, int]:
    """Bytes on disk by what they are, under the keys of `plan --json`."""
    model, method = request.model, plan.method
    adapter = (4 if not method.full else ITEM_BYTES[request.dtype]) * plan.trainable
    disk = {"base": model.disk_bytes, "adapter": adapter, "checkpoints": 3 * 3 * adapter}
    if method.streamed:
        batches = micro_batches(request, plan.micro_batch)
        tokens = max(batch.tokens for batch in batches) * (request.batch_size // plan.micro_batch)
        disk["states"] = max(0, streamed_state_bytes(model, tokens, ITEM_BYTES[request.dtype]) - STATES_IN_MEMORY)
    cached = _cached_bytes(request, method)
    if cached:
        disk["kept"] = cached
    if method.quantize != "none":
        disk["packed"] = base_bytes(model, method, request.dtype)
    return disk


def _with_seconds(request: PlanRequest, plan: Plan, speed: MachineSpeed, skipped: float) -> Plan:
    """The plan with its seconds, where layers below the adapters are not computed for the share `skipped` of rows."""
    model, method, compute = request.model, plan.method, request.recipe.compute
    schedule = request.schedule(plan.micro_batch)
    batches = micro_batches(request, plan.micro_batch)
    steps = [step_counts(model, method, batch) + cached_counts(model, method, batch) * -skipped for batch in batches]
    count = schedule.steps * schedule.accumulation
    training = sum(steps, OpCounts(0, 0, 0)) * (count / len(steps))
    update = OpCounts(0, 8.0 * plan.trainable, model.adapted_layers)  # clipping and the optimizer, once a step
    training += update * schedule.steps
    skipped_later = _skipped_fraction(request, method, math.inf)  # the first scoring computes what later ones read
    scores = [
        forward_counts(model, batch) + cached_counts(model, method, batch) * -skipped_later
        for batch in scored_batches(request, plan.micro_batch)
    ]
    held_out = request.work.held_out
    scoring = sum(scores, OpCounts(0, 0, 0)) * (len(held_out) / max(len(_sample_rows(held_out)), 1))
    evaluations = max(1, -int(-schedule.epochs // 1))
    reading = plan.read_per_step * schedule.steps / speed.disk_bytes_per_second
    around = (SET_UP + SAVE * evaluations) * speed.start_seconds
    scorings = evaluations + 1  # the base is scored with the first epoch
    seconds = training.seconds(speed, compute) + scorings * scoring.seconds(speed) + reading + around
    whole = seconds + speed.start_seconds + 2 * model.disk_bytes / speed.disk_bytes_per_second
    per_step = training.seconds(speed, compute) / schedule.steps + plan.read_per_step / speed.disk_bytes_per_second
    return dataclasses.replace(plan, seconds=seconds, whole_seconds=whole, step_seconds=per_step)


def _read_per_step(request: PlanRequest, plan: Plan, base: int, skipped: float) -> int:
    """Bytes read from disk in a step, of a base of `base` bytes: none if it stays in memory. Streaming reads it twice,
    but layers below the adapters once, and not at all for the share `skipped` of rows."""
    model, method = request.model, plan.method
    if method.streamed:
        below = model.matmul_weights * model.cached_layers / max(model.dims.layers, 1)
        share = below / (model.matmul_weights + model.other_weights)
        return round(base * (2 - share * (1 + skipped)))
    accumulation = request.batch_size // plan.micro_batch
    return 2 * base * accumulation if _is_mapped(request, method) and not plan.fits else 0


def _is_mapped(request: PlanRequest, method: Method) -> bool:
    """Whether the base's weights are memory-mapped: from its own file, or from the cache of quantized bases."""
    same = request.model.stored_dtype == request.dtype or method.quantize != "none"
    return same and not request.machine.accelerator


def _cached_bytes(request: PlanRequest, method: Method) -> int:
    """Bytes on disk of the cached hidden states below the adapters: one of each token, up to --cache-limit."""
    if method.full or not request.model.cached_layers:
        return 0
    all_states = _all_states_bytes(request)
    return min(all_states, request.recipe.cache_limit or all_states)


def _all_states_bytes(request: PlanRequest) -> int:
    """Bytes of one hidden state for each token of all rows."""
    tokens = int(request.work.rows[:, 0].sum() + request.work.held_out[:, 0].sum())
    return tokens * request.model.dims.hidden * ITEM_BYTES[request.dtype]


def _skipped_fraction(request: PlanRequest, method: Method, epochs: float) -> float:
    """The share of rows, over all epochs, for which the layers below the adapters are not computed."""
    share = _cached_bytes(request, method) / max(_all_states_bytes(request), 1)
    return share * (1 - (1 - request.work.cached_fraction) / max(epochs, 1))


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
