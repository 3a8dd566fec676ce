"""Measures the settings that a recipe leaves open: `--lr auto` and `--layers auto`."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hatrack.base.free_memory import release_memory
from hatrack.base.layer_stack import find_layer_stack
from hatrack.base.load import Base
from hatrack.check.prepared import Prepared
from hatrack.console import say
from hatrack.data.batch import LengthBatches, collate
from hatrack.errors import ModelError
from hatrack.evaluate.loss import Batch
from hatrack.evaluate.score import LossRunner, Score, ScoreSettings, main_metric, score
from hatrack.planning.schedule import Schedule
from hatrack.recipe import Recipe
from hatrack.training.adapted_model import load_adapted_model
from hatrack.training.depth import (
    BATCH_PART,
    MAX_SCORED,
    MIN_GAIN_SHARE,
    TIMED_STEPS,
    DepthTrial,
    MeasuredDepth,
    choose_depth,
    depths_to_try,
    keeps_enough,
    trial_steps,
    try_depths,
)
from hatrack.training.lr_range import find_learning_rate


def measure_learning_rate(base: Base, model: Any, prepared: Prepared) -> float:
    """Measures the peak learning rate by a range test on the rows of one step."""
    return find_learning_rate(
        model, _first_steps(base, prepared, prepared.schedule, 1)[0], prepared.task, prepared.usual_lr
    )


def choose_layers(prepared: Prepared) -> Recipe:
    """Returns the recipe with the fewest top layers that score about as well as all in a short trial; says why."""
    try:
        return prepared.recipe.changed(layers=_compare_depths(prepared))
    except (ModelError, ValueError) as error:  # no single stack of layers, or its output is not deterministic
        say(f"layers: all; depths cannot be compared: {error}")
        return prepared.recipe.changed(layers="all")


def _compare_depths(prepared: Prepared) -> str:
    """Compares depths and returns the chosen value of --layers."""
    count = trial_steps(prepared.schedule.steps)
    if not count:
        say(f"layers: all; a run of {prepared.schedule.steps:,} steps is too short to try several depths first")
        return "all"
    adapted = load_adapted_model(prepared)
    base, model = adapted.base, adapted.model
    stack = find_layer_stack(base.model)
    trial, rows_below = _make_trial(base, prepared, count), _rows_below(prepared)
    names = ", ".join(f"top {top}" for top in depths_to_try(len(stack.layers))[1:])
    say(f"layers: trying {count} small steps with adapters on all {len(stack.layers)} layers, and on the {names}")
    before = trial.score(model, None)
    tried: list[MeasuredDepth] = []
    for depth in try_depths(model, stack, trial):
        tried.append(depth)
        seconds = depth.seconds(prepared.schedule.steps, rows_below)
        say(f"  {depth.name}: {_format_score(depth.score)} after them; about {seconds:,.0f} s for the whole run")
        if not keeps_enough(depth, tried[0], before.metrics["loss"]):  # smaller depths would keep even less
            break
    chosen = choose_depth(tried, before.metrics["loss"], prepared.schedule.steps, rows_below)
    say(f"layers: {_explain(tried, chosen, before, prepared)}")
    del adapted, base, model, stack, trial
    release_memory()
    return chosen.name


def _make_trial(base: Base, prepared: Prepared, count: int) -> DepthTrial:
    rows = max(1, prepared.schedule.batch_size // BATCH_PART)
    small = replace(prepared.schedule, batch_size=rows, micro_batch=math.gcd(rows, prepared.schedule.micro_batch))
    held_out = prepared.tokens.held_out.first(min(MAX_SCORED, max(32, count * rows // 4)))

    def score_model(model: Any, run: LossRunner | None) -> Score:
        pad_id = base.tokenizer.pad_token_id
        return score(model, held_out, ScoreSettings(prepared.task, 8, pad_id, base.device), run)

    steps = _first_steps(base, prepared, small, count)
    whole = _first_steps(base, prepared, prepared.schedule, TIMED_STEPS)
    return DepthTrial(steps, whole, prepared.task, prepared.schedule.lr, score_model)


def _first_steps(base: Base, prepared: Prepared, schedule: Schedule, count: int) -> list[list[Batch]]:
    """Returns the micro-batches of a schedule's first steps, on the base's device."""
    train_rows = prepared.tokens.train
    order = LengthBatches(
        train_rows.lengths, schedule.micro_batch, prepared.recipe.seed, by_tokens=prepared.task != "classify"
    )
    found = [
        collate([train_rows.row(index) for index in rows], base.tokenizer.pad_token_id, prepared.task)
        for rows in itertools.islice(order, count * schedule.accumulation)
    ]
    moved = [{name: tensor.to(base.device) for name, tensor in batch.items()} for batch in found]
    return [moved[start : start + schedule.accumulation] for start in range(0, len(moved), schedule.accumulation)]


def _rows_below(prepared: Prepared) -> int:
    """Counts the rows that pass through the layers below the adapters: each once, or without a cache, each time."""
    visits = prepared.schedule.steps * prepared.schedule.batch_size
    return visits if prepared.recipe.cache_limit == 0 else min(len(prepared.tokens.train), visits)


def _explain(tried: Sequence[MeasuredDepth], chosen: MeasuredDepth, before: Score, prepared: Prepared) -> str:
    """Explains the choice: what it costs and what it saves."""
    all_layers, metric = tried[0], main_metric(prepared.task)
    gain = before.metrics["loss"] - all_layers.loss
    if chosen is all_layers:
        less = f"fewer lowered it by less than {MIN_GAIN_SHARE:.0%} of that"
        return f"all; they lowered the held-out loss by {gain:.3f}, and {less}"
    share = (before.metrics["loss"] - chosen.loss) / gain
    change = chosen.score.metrics[metric] - all_layers.score.metrics[metric]
    full, short = (depth.seconds(prepared.schedule.steps, _rows_below(prepared)) for depth in (all_layers, chosen))
    return (
        f"{chosen.name} lowered the held-out loss by {share:.0%} of what all {chosen.layers} layers did "
        f"({metric} {change:+.3f} on {len(chosen.score.weights):,} rows), in about {short:,.0f} s, not {full:,.0f}"
    )


def _format_score(score: Score) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in score.metrics.items() if name in ("accuracy", "loss"))
