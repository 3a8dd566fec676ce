"""Prepares a run: reads base and data once, and plans memory, time and schedule. Loads no weights."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from hatrack.base.description import BaseDescription
from hatrack.base.fingerprint import base_record
from hatrack.base.free_memory import resident_bytes, trim_heap
from hatrack.base.load import choose_device, choose_dtype, dtype_name, free_memory
from hatrack.base.quantized_cache import cache_key, is_cached
from hatrack.base.sources import find_base
from hatrack.check.prepared import Prepared
from hatrack.check.reading import read_recipe_examples, tokenize_for_base
from hatrack.console import format_size, say
from hatrack.data.examples import Examples
from hatrack.data.tokens import Tokens
from hatrack.layers.fast_base import check_rounding
from hatrack.planning import fit
from hatrack.planning.fit import Plan, PlanRequest, Workload
from hatrack.planning.machine import Machine, check_compute, this_machine
from hatrack.planning.model_shape import dimensions_of
from hatrack.planning.schedule import Schedule
from hatrack.recipe import Recipe
from hatrack.training.hidden_states import HiddenStateCache, open_hidden_state_cache, row_key


@dataclass(frozen=True)
class RunInputs:
    """Everything that a run reads once: the base's small files, its fingerprint and tokenizer, and the rows as tokens.

    `device` and `dtype`: where, and in which dtype, the base will be loaded.
    """

    base: BaseDescription
    base_record: dict[str, Any]
    tokenizer: Any
    examples: Examples
    tokens: Tokens
    device: torch.device
    dtype: str


def read_inputs(recipe: Recipe, template: str | None = None) -> RunInputs:
    """Reads base and data of a recipe. `template` is the chat template to use, by default the base's own.

    Raises DataError, ModelError or RecipeError if one of them cannot be used.
    """
    examples = read_recipe_examples(recipe)
    base = find_base(str(recipe.base), recipe.revision, trust=recipe.trust_remote_code)
    tokenizer, examples, tokens = tokenize_for_base(recipe, base, examples, template)
    device = choose_device(recipe.device)[0]
    check_compute(recipe.compute, device.type)
    check_rounding(recipe.compute, device.type)
    dtype = dtype_name(choose_dtype(recipe.dtype, device)[0])
    return RunInputs(base, base_record(base, recipe.quantize), tokenizer, examples, tokens, device, dtype)


@contextmanager
def hidden_state_cache(recipe: Recipe, inputs: RunInputs) -> Iterator[HiddenStateCache | None]:
    """Opens the cache of the hidden states after the layers below the adapters. Yields None if it is not used.

    Its key covers everything that these hidden states depend on, except a row's tokens.
    """
    layers_below = dimensions_of(inputs.base.config).layers - (recipe.top_layers or math.inf)
    cache = None
    if layers_below > 0 and recipe.cache_limit != 0:
        key = {
            "fingerprint": inputs.base_record["fingerprint"],
            "config": hashlib.sha256(json.dumps(inputs.base.config, sort_keys=True).encode()).hexdigest()[:16],
            "task": "classify" if inputs.examples.task == "classify" else "generate",
            "pad": inputs.tokenizer.pad_token_id,
            "layers": layers_below,
            "dtype": inputs.dtype,
            "quantize": recipe.quantize,
            "device": inputs.device.type,
            "transformers": transformers.__version__,
        }
        cache = open_hidden_state_cache(key, inputs.base_record["source"], recipe.cache_limit)
    if cache is None:
        yield None
        return
    with closing(cache):
        yield cache


def prepare(
    recipe: Recipe,
    inputs: RunInputs,
    *,
    cache: HiddenStateCache | None = None,
    micro_batch: int | None = None,
    quiet: bool = False,
) -> Prepared:
    """Plans the run and, unless `quiet`, says what was derived. `micro_batch` is that of an interrupted run, which a
    resumed one keeps.

    Raises RecipeError where the run does not fit in this machine's memory, unless the recipe says `force`; TargetError
    where no layer of the base has the names of `targets`.
    """
    trim_heap()  # frees what reading and tokenizing needed for a moment
    examples, tokens = inputs.examples, inputs.tokens
    cached_fraction = _cached_fraction(cache, tokens)
    work = Workload(
        task=examples.task,
        labels=len(examples.labels),
        row_sizes=tokens.train.sizes,
        held_out_sizes=tokens.held_out.sizes,
        process_bytes=None if inputs.device.type == "cuda" else resident_bytes(),
        cached_fraction=cached_fraction,
        quantized_cached=_is_quantized_base_cached(recipe, inputs),
    )
    request, plan = fit.plan_or_raise(
        recipe, inputs.base, work, _this_machine(inputs.device, inputs.dtype), micro_batch
    )
    schedule = request.schedule(plan.micro_batch)
    if not quiet:
        _say_plan(request, plan, schedule)
    return Prepared(
        recipe=recipe,
        base=inputs.base,
        dtype=inputs.dtype,
        tokenizer=inputs.tokenizer,
        examples=examples,
        tokens=tokens,
        plan=plan,
        schedule=schedule,
        cached_fraction=cached_fraction,
        base_record=inputs.base_record,
    )


def _cached_fraction(cache: HiddenStateCache | None, tokens: Tokens) -> float:
    """The share of all rows whose hidden states are cached by an earlier run."""
    if not cache:
        return 0.0
    keys = [row_key(rows.row(index)[0]) for rows in (tokens.train, tokens.held_out) for index in range(len(rows))]
    return sum(key in cache for key in keys) / len(keys)


def _is_quantized_base_cached(recipe: Recipe, inputs: RunInputs) -> bool:
    if recipe.quantize == "none":
        return False
    key = cache_key(
        inputs.base,
        task=inputs.examples.task,
        quantize=recipe.quantize,
        dtype=inputs.dtype,
        device=inputs.device.type,
    )
    return is_cached(key)


def _this_machine(device: torch.device, dtype: str) -> Machine:
    """This machine, with the memory that is free now."""
    machine = dataclasses.replace(this_machine("auto" if device.type == "cuda" else "cpu", dtype), dtype=dtype)
    if device.type == "cuda":
        return dataclasses.replace(machine, memory=free_memory(device), accelerator=True)
    if device.type == "cpu":
        return machine
    return dataclasses.replace(machine, accelerator=True, speed=None, can_stream=device.type != "mps")


def _say_plan(request: PlanRequest, plan: Plan, schedule: Schedule) -> None:
    if not plan.fits:
        needed, limit = format_size(plan.peak_memory_bytes), format_size(request.limit)
        say(f"this does not fit: {needed} needed, {limit} available; started anyway because of --force")
    if schedule.reasons:
        say(f"derived: {', '.join(schedule.reasons)}")
    micro_batches = f" ({schedule.micro_batch} at a time, to fit)" if schedule.accumulation > 1 else ""
    say(
        f"{len(request.work.row_sizes):,} rows to learn from, {len(request.work.held_out_sizes):,} held out; "
        f"{schedule.steps:,} steps of {schedule.batch_size} rows{micro_batches}"
    )
    if plan.method.checkpointing:
        say("activation checkpointing is used, to fit")
    rate = "the measured rate (see below)" if request.recipe.lr == "auto" else f"{schedule.lr:g}"
    warmup = schedule.warmup_steps
    rise = f"up to {rate} in {warmup} step{'s' * (warmup > 1)}, then" if warmup else f"{rate}, then"
    say(f"learning rate: {rise} linear decay to 0")
    speed = request.machine.speed
    is_measured = plan.seconds is not None and speed is not None and speed.source == "probe"
    time = f", about {plan.seconds:,.0f} s of training" if is_measured else ""
    say(f"expected peak memory: {format_size(plan.peak_memory_bytes)}{time}")
