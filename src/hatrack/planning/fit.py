"""Whether a run fits a machine, with the largest micro-batch that does, and the one change that makes it fit.

Knows no torch and reads no weights: a base's headers, the rows' lengths and what the machine has are enough.
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
from hatrack.planning.time import OpCounts, cached_counts, forward_counts, step_counts
from hatrack.recipe import Recipe

METHODS = {
    "full": Method(full=True),
    "LoRA": Method(),
    "LoRA, 8-bit base": Method(quantize="8bit"),
    "LoRA, 4-bit base": Method(quantize="4bit"),
    "LoRA, streamed": Method(streamed=True),
}
"""The columns of a plan."""
MOST_ROWS = 20_000
"""Of more rows, so many evenly chosen ones stand for all."""
MIN_SCORED_ROWS = 8
"""Rows that are scored at a time, where a micro-batch has fewer."""
SET_UP, SAVE = 0.05, 0.02
"""Setting the trainer up and saving a checkpoint, as shares of the seconds that a start takes."""
USUAL = 1.05
"""A process that holds up to so many times what imports take is a command: `plan` and `train` say one figure. Python
scripts, notebooks and runs that read from the hub import more, which is counted."""
MARGIN = 0.95
"""Share of the available memory that is planned with: the system needs a little of it."""


@dataclass(frozen=True)
class Workload:
    """What there is to learn: (n, 2) of each row to learn from, and of each held out, how many tokens it has and how
    many of them are supervised (0 to classify). `framework` is what the process holds already, None where it has yet to
    start; `known` the share of rows whose way through the layers below all adapters is kept; `packed` says that the
    quantised base is."""

    task: str
    labels: int
    rows: np.ndarray
    held_out: np.ndarray
    process_bytes: int | None = None
    cached_fraction: float = 0.0
    quantized_cached: bool = False

    @property
    def longest(self) -> int:
        """Tokens of the longest row to learn from."""
        return int(self.rows[:, 0].max())


@dataclass(frozen=True)
class Plan:
    """What a run is expected to take. `memory` in bytes by term, for `micro_batch` rows at a time.

    `limit` is the memory there is, None where nothing limits it. `seconds` are those of training (as `train --json`
    counts them), `whole_seconds` those of the process from start to end; None where nothing is known of the machine.
    `read` is bytes read from disk in a step once the base has been read, `disk` bytes by what lies there.
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
        """Whether what is needed stays below the limit."""
        return self.limit is None or required_bytes(self.memory) <= self.limit

    def as_json(self) -> dict[str, Any]:
        """The plan as `train --json` and `plan --json` show it."""
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
            "seconds": _rounded(self.seconds),
            "seconds_per_step": _rounded(self.step_seconds),
            "whole_seconds": _rounded(self.whole_seconds),
        }


def required_bytes(memory: Mapping[str, int]) -> int:
    """All terms but the pages of files that are read once while loading, which the system drops where it is short."""
    return sum(memory.values()) - memory.get("loading", 0)


@dataclass(frozen=True)
class PlanRequest:
    """All that a plan depends on: a base with its adapter, the work, the machine and the recipe."""

    recipe: Recipe
    model: ModelShape
    work: Workload
    machine: Machine

    @property
    def dtype(self) -> str:
        """The number format of the base."""
        return self.machine.dtype if self.recipe.dtype == "auto" else self.recipe.dtype

    @property
    def limit(self) -> int:
        """Bytes the run may take: as asked, and never more than there are."""
        there = int(self.machine.memory * MARGIN) + (self.work.process_bytes or 0)
        return min(there, self.recipe.memory or there)

    @property
    def batch_size(self) -> int:
        """Rows of a step."""
        return batch_rows(self.recipe, task=self.work.task, rows=len(self.work.rows))

    def schedule(self, micro_batch: int) -> Schedule:
        """The schedule with so many rows at a time."""
        return derive(
            self.recipe,
            task=self.work.task,
            rows=len(self.work.rows),
            hidden_size=self.model.dims.hidden,
            micro_batch=micro_batch,
        )


def make_request(recipe: Recipe, peeked: BaseDescription, work: Workload, machine: Machine) -> PlanRequest:
    """Raises TargetError or RecipeError where the recipe does not fit the base."""
    return PlanRequest(recipe, describe_model(peeked, recipe, task=work.task, labels=work.labels), work, machine)


def plan_or_raise(
    recipe: Recipe, peeked: BaseDescription, work: Workload, machine: Machine, rows: int | None = None
) -> tuple[PlanRequest, Plan]:
    """The plan that training follows, with `rows` at a time where an interrupted run had so many. Where the base has no
    room in memory it stays on disk, and each step sweeps over it.

    Raises RecipeError where it does not fit, unless the recipe says `force`; TargetError as `setting` does.
    """
    where = make_request(recipe, peeked, work, machine)
    found = choose_plan(where, rows)
    if not found.fits and not recipe.force:
        raise too_large_error(where, found)
    return where, found


def choose_plan(where: PlanRequest, rows: int | None = None) -> Plan:
    """The recipe's own way where that fits, else a sweep where that does and can be."""
    found = plan_run(where, rows=rows)
    if not found.fits and not _needs_whole_base(where):
        streamed = plan_run(where, Method(streamed=True), rows)
        found = streamed if streamed.fits else found
    return found


def _needs_whole_base(where: PlanRequest) -> str | None:
    """The option that a base cannot be streamed with, one layer after the other; None where it can."""
    recipe = where.recipe
    options = {"quantize": recipe.quantize != "none", "variant": recipe.variant in ("dora", "pissa")}
    options |= {"lr": recipe.lr == "auto", "layers": recipe.layers == "auto", "device": not where.machine.can_stream}
    return next((name for name, needs in options.items() if needs), None)


def plan_run(where: PlanRequest, method: Method | None = None, rows: int | None = None) -> Plan:
    """The plan of a run by one method, by default the recipe's: as many rows at a time as fit (or exactly `rows`, where
    they are given), activations kept.

    Where not even one row fits, activations are computed again in the backward pass; where that does not fit either,
    the plan is the smallest there is, and `fits` is false.
    """
    method = method or Method(quantize=where.recipe.quantize)
    tries = [method] if method.streamed else [method, dataclasses.replace(method, checkpointing=True)]
    for tried in tries:
        memory_for = functools.partial(_memory_for, where, tried)
        found, memory = (
            (rows, memory_for(rows)) if rows else largest_micro_batch(memory_for, where.batch_size, where.limit)
        )
        if required_bytes(memory) <= where.limit:
            break
    return _priced(where, Plan(_trained(where, tried), where.model.counts.total, found, memory, tried, where.limit))


def largest_micro_batch(
    memory_for: Callable[[int], dict[str, int]], batch_size: int, limit: int
) -> tuple[int, dict[str, int]]:
    """The most rows at a time that divide the batch and stay under `limit` bytes, else one; and their bytes by term."""
    for rows in range(batch_size, 0, -1):
        if batch_size % rows == 0:
            memory = memory_for(rows)
            if required_bytes(memory) <= limit or rows == 1:
                return rows, memory
    raise ValueError("a batch has at least one row")


def suggest_change(where: PlanRequest, plan: Plan) -> str | None:
    """The one change that makes a run fit that does not, the one that alters the result least first; None if none."""
    for words, recipe, method in _changes(where, plan):
        most = recipe.max_length or np.iinfo(np.int64).max
        cut = {"rows": np.minimum(where.work.rows, most), "held_out": np.minimum(where.work.held_out, most)}
        other = dataclasses.replace(where, recipe=recipe, work=dataclasses.replace(where.work, **cut))
        found = plan_run(other, method)
        if found.fits:
            return f"{words} ({format_size(required_bytes(found.memory))})"
    return None


def too_large_error(where: PlanRequest, plan: Plan) -> RecipeError:
    """The complaint about a run that does not fit: what it takes, what there is, and what to change."""
    largest = max(plan.memory, key=lambda term: plan.memory[term])
    most = f"{format_size(required_bytes(plan.memory))} needed, of which {largest} {format_size(plan.memory[largest])}"
    asked = where.recipe.memory is not None and where.recipe.memory <= where.limit
    limit = (
        f"--memory {format_size(where.limit)}"
        if asked
        else f"{format_size(where.limit)} of memory ({where.machine.reason})"
    )
    cure = (
        suggest_change(where, plan)
        or f"a smaller base, or a machine with {format_size(required_bytes(plan.memory) / MARGIN)}"
    )
    return RecipeError(f"{limit} is too little even for one row at a time", got=most, fix=f"{cure}; or --force")


def _changes(where: PlanRequest, plan: Plan) -> list[tuple[str, Recipe, Method]]:
    """What to try, in order: shorter rows first where one row is the trouble, else the base in fewer bits."""
    method = plan.method
    shorter = []
    length = 1 << max(where.work.longest - 1, 1).bit_length() - 1
    while length >= 32:
        shorter.append((f"--max-length {length}", where.recipe.changed(max_length=length), method))
        length //= 2
    fewer = [
        (f"--quantize {bits}", where.recipe.changed(quantize=bits), dataclasses.replace(method, quantize=bits))
        for bits in ("8bit", "4bit")
        if method.quantize == "none"
    ]
    streamed = [
        (f"{words}, and the base streamed layer by layer", where.recipe.changed(**{name: value}), Method(streamed=True))
        for words, name, value in (
            ("--variant lora", "variant", "lora"),
            ("no --lr auto", "lr", None),
            ("--layers all", "layers", "all"),
        )
        if _needs_whole_base(where) == name
    ]
    by_rows = sum(plan.memory[term] for term in ("activations", "heap", "scoring")) > plan.memory["weights"]
    return [*shorter[:1], *streamed, *fewer, *shorter[1:]] if by_rows else [*streamed, *fewer, *shorter]


def _trained(where: PlanRequest, method: Method) -> int:
    counted = where.model.counts
    return counted.total - counted.lora - counted.head if method.full else counted.trainable


def _memory_for(where: PlanRequest, method: Method, rows: int) -> dict[str, int]:
    """Bytes by term, with `rows` at a time."""
    work, machine = where.work, where.machine
    batches = micro_batches(where, rows)
    largest = max(batches, key=lambda batch: batch.tokens)
    process = (machine.imported_bytes or FRAMEWORK) + (BITSANDBYTES_IMPORTED if method.quantize != "none" else 0)
    if (work.process_bytes or 0) > USUAL * process:  # a process that does other things too
        process = work.process_bytes or 0
    all_cached = work.cached_fraction == 1 and _mapped(where, method) and not method.full and not method.streamed
    run = MemoryRequest(
        where.model,
        method,
        where.dtype,
        largest,
        step_tokens=largest.tokens * (where.batch_size // rows),
        scored=max(scored_batches(where, rows), key=lambda batch: batch.tokens, default=None),
        dropout=where.recipe.dropout,
        fast_layers=method.quantize == "none" and where.recipe.variant != "dora",
        accelerator=machine.accelerator,
        stored_matmuls=where.dtype == "bfloat16" and cpu.has_fast_bfloat16(),
        process_bytes=process,
        unread_layers=where.model.cached_layers if all_cached else 0,
        quantized_cached=work.quantized_cached,
    )
    return training_bytes(run)


def scored_batches(where: PlanRequest, rows: int) -> list[MicroBatch]:
    """The batches in which held-out rows are scored, of a run with so many rows at a time."""
    thin = _thinned(where.work.held_out)
    return _batches(thin, scoring_batches(thin[:, 0], max(rows, MIN_SCORED_ROWS))) if len(thin) else []


def micro_batches(where: PlanRequest, rows: int) -> list[MicroBatch]:
    """The very micro-batches that training with so many rows at a time will meet, of at most two epochs."""
    schedule, work = where.schedule(rows), where.work
    thin = _thinned(work.rows)
    wanted = schedule.steps * schedule.accumulation
    found: list[MicroBatch] = []
    for epoch in range(2):
        order = epoch_batches(thin[:, 0], rows, where.recipe.seed, epoch, by_tokens=work.task != "classify")
        found += _batches(thin, order)
        if len(found) >= wanted:
            break
    return found[:wanted]


def _batches(rows: np.ndarray, order: Sequence[np.ndarray]) -> list[MicroBatch]:
    return [MicroBatch(len(b), int(rows[b, 0].max()), int(rows[b, 1].sum())) for b in order]


def _thinned(rows: np.ndarray) -> np.ndarray:
    return rows if len(rows) <= MOST_ROWS else rows[np.argsort(rows[:, 0])][:: -(-len(rows) // MOST_ROWS)]


def _priced(where: PlanRequest, plan: Plan) -> Plan:
    """The plan with its seconds, bytes on disk and bytes read."""
    model, method = where.model, plan.method
    adapter = (4 if not method.full else ITEM_BYTES[where.dtype]) * plan.trainable
    disk = {"base": model.disk_bytes, "adapter": adapter, "checkpoints": 3 * 3 * adapter}
    if method.streamed:
        batches = micro_batches(where, plan.micro_batch)
        tokens = max(batch.tokens for batch in batches) * (where.batch_size // plan.micro_batch)
        disk["states"] = max(0, streamed_state_bytes(model, tokens, ITEM_BYTES[where.dtype]) - STATES_IN_MEMORY)
    kept = cached_bytes(where, method)
    if kept:
        disk["kept"] = kept
    if method.quantize != "none":
        disk["packed"] = base_bytes(model, method, where.dtype)
    schedule = where.schedule(plan.micro_batch)
    spared = _spared(where, method, schedule.epochs)
    read = _read(where, plan, disk.get("packed", model.disk_bytes), spared)
    plan = dataclasses.replace(plan, disk=disk, read_per_step=read)
    speed = where.machine.speed
    if speed is None:
        return plan
    batches = micro_batches(where, plan.micro_batch)
    steps = [step_counts(model, method, batch) + cached_counts(model, method, batch) * -spared for batch in batches]
    count = schedule.steps * schedule.accumulation
    training = sum(steps, OpCounts(0, 0, 0)) * (count / len(steps))
    update = OpCounts(0, 8.0 * plan.trainable, model.adapted_layers)  # clipping and the optimizer, once a step
    training += update * schedule.steps
    scored = scored_batches(where, plan.micro_batch)
    again = _spared(where, method, math.inf)  # the first of all scores computes what the later ones read
    scoring = sum(
        (forward_counts(model, b) + cached_counts(model, method, b) * -again for b in scored), OpCounts(0, 0, 0)
    )
    scoring = scoring * (len(where.work.held_out) / max(len(_thinned(where.work.held_out)), 1))
    evaluations = max(1, -int(-schedule.epochs // 1))
    reading = read * schedule.steps / speed.disk_bytes_per_second
    around = (SET_UP + SAVE * evaluations) * speed.start_seconds
    scores = evaluations + 1  # the base's is taken with the first epoch's
    compute = where.recipe.compute
    seconds = training.seconds(speed, compute) + scores * scoring.seconds(speed) + reading + around
    whole = seconds + speed.start_seconds + 2 * model.disk_bytes / speed.disk_bytes_per_second
    per_step = training.seconds(speed, compute) / schedule.steps + read / speed.disk_bytes_per_second
    return dataclasses.replace(plan, seconds=seconds, whole_seconds=whole, step_seconds=per_step)


def _read(where: PlanRequest, plan: Plan, base: int, spared: float) -> int:
    """Bytes read from disk in a step, of a base of `base` bytes: none where it stays in memory. A sweep reads it twice,
    the layers below all adapters once, and these not at all for the share `spared` of rows whose results are kept."""
    model, method = where.model, plan.method
    if method.streamed:
        below = model.matmul_weights * model.cached_layers / max(model.dims.layers, 1)
        share = below / (model.matmul_weights + model.other_weights)
        return round(base * (2 - share * (1 + spared)))
    accumulation = where.batch_size // plan.micro_batch
    return 2 * base * accumulation if _mapped(where, method) and not plan.fits else 0


def _mapped(where: PlanRequest, method: Method) -> bool:
    """Whether the base's weights are the pages of a file: its own, or the one that quantised weights are kept in."""
    same = where.model.stored_dtype == where.dtype or method.quantize != "none"
    return same and not where.machine.accelerator


def cached_bytes(where: PlanRequest, method: Method) -> int:
    """Bytes on disk of what the layers below all adapters give: of each token a hidden state, up to --cache-limit."""
    if method.full or not where.model.cached_layers:
        return 0
    whole = _all_states_bytes(where)
    return min(whole, where.recipe.cache_limit or whole)


def _all_states_bytes(where: PlanRequest) -> int:
    """Bytes of one hidden state for each token of all rows."""
    tokens = int(where.work.rows[:, 0].sum() + where.work.held_out[:, 0].sum())
    return tokens * where.model.dims.hidden * ITEM_BYTES[where.dtype]


def _spared(where: PlanRequest, method: Method, epochs: float) -> float:
    """The share of all rows' visits in which the layers below all adapters need not be computed."""
    share = cached_bytes(where, method) / max(_all_states_bytes(where), 1)
    return share * (1 - (1 - where.work.cached_fraction) / max(epochs, 1))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
