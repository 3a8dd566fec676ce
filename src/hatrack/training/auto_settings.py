"""Settings that a recipe leaves to a measurement: the learning rate (`--lr auto`) and the depth (`--layers auto`)."""

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
from hatrack.evaluate.score import LossRunner, Score, main_metric, score
from hatrack.planning.schedule import Schedule
from hatrack.recipe import Recipe
from hatrack.training.adapted_model import load_adapted_model
from hatrack.training.depth import (
    KEEP,
    SCORED,
    SMALLER,
    TIMED,
    DepthTrial,
    MeasuredDepth,
    choose,
    depths_to_try,
    keeps_enough,
    trial_steps,
    try_depths,
)
from hatrack.training.lr_range import find_learning_rate


def measure_learning_rate(base: Base, model: Any, prepared: Prepared) -> float:
    """The peak learning rate that a range test finds on the rows of one step."""
    return find_learning_rate(
        model, _first_steps(base, prepared, prepared.schedule, 1)[0], prepared.task, prepared.usual_lr
    )


def choose_layers(prepared: Prepared) -> Recipe:
    """The recipe with as few adapted layers as a short comparison finds enough; says what that costs and saves."""
    try:
        return prepared.recipe.changed(layers=_compared(prepared))
    except (ModelError, ValueError) as error:  # no single stack of layers, or one that is not the same each time
        say(f"layers: all; depths cannot be compared: {error}")
        return prepared.recipe.changed(layers="all")


def _compared(prepared: Prepared) -> str:
    count = trial_steps(prepared.schedule.steps)
    if not count:
        say(f"layers: all; a run of {prepared.schedule.steps:,} steps is too short to try several depths first")
        return "all"
    adapted = load_adapted_model(prepared)
    base, model = adapted.base, adapted.model
    trunk = find_layer_stack(base.model)
    trial, seen = _trial(base, prepared, count), _rows_seen(prepared)
    names = ", ".join(f"top {top}" for top in depths_to_try(len(trunk.layers))[1:])
    say(f"layers: trying {count} small steps with adapters on all {len(trunk.layers)} layers, and on the {names}")
    before = trial.score(model, None)
    tried: list[MeasuredDepth] = []
    for depth in try_depths(model, trunk, trial):
        tried.append(depth)
        seconds = depth.seconds(prepared.schedule.steps, seen)
        say(f"  {depth.name}: {_shown(depth.score)} after them; about {seconds:,.0f} s for the whole run")
        if not keeps_enough(depth, tried[0], before.metrics["loss"]):  # a smaller one would keep less
            break
    chosen = choose(tried, before.metrics["loss"], prepared.schedule.steps, seen)
    say(f"layers: {_verdict(tried, chosen, before, prepared, seen)}")
    del adapted, base, model, trunk, trial
    release_memory()
    return chosen.name


def _trial(base: Base, prepared: Prepared, count: int) -> DepthTrial:
    rows = max(1, prepared.schedule.batch_size // SMALLER)
    small = replace(prepared.schedule, batch_size=rows, micro_batch=math.gcd(rows, prepared.schedule.micro_batch))
    held_out = prepared.tokens.held_out.first(min(SCORED, max(32, count * rows // 4)))

    def scored(model: Any, run: LossRunner | None) -> Score:
        pad_id = base.tokenizer.pad_token_id
        return score(model, held_out, task=prepared.task, batch_size=8, pad_id=pad_id, device=base.device, run=run)

    steps = _first_steps(base, prepared, small, count)
    whole = _first_steps(base, prepared, prepared.schedule, TIMED)
    return DepthTrial(steps, whole, prepared.task, prepared.schedule.lr, scored)


def _first_steps(base: Base, prepared: Prepared, schedule: Schedule, count: int) -> list[list[Batch]]:
    """The micro-batches of a schedule's first steps, on the base's device."""
    learn = prepared.tokens.train
    order = LengthBatches(
        learn.lengths, schedule.micro_batch, prepared.recipe.seed, by_tokens=prepared.task != "classify"
    )
    found = [
        collate([learn.row(index) for index in rows], base.tokenizer.pad_token_id, prepared.task)
        for rows in itertools.islice(order, count * schedule.accumulation)
    ]
    moved = [{name: tensor.to(base.device) for name, tensor in batch.items()} for batch in found]
    return [moved[start : start + schedule.accumulation] for start in range(0, len(moved), schedule.accumulation)]


def _rows_seen(prepared: Prepared) -> int:
    """Rows that go through the layers below the adapters: each once, or where nothing is kept in every epoch."""
    visits = prepared.schedule.steps * prepared.schedule.batch_size
    return visits if prepared.recipe.cache_limit == 0 else min(len(prepared.tokens.train), visits)


def _verdict(
    tried: Sequence[MeasuredDepth], chosen: MeasuredDepth, before: Score, prepared: Prepared, seen: int
) -> str:
    """What was chosen, what it costs and what it saves."""
    everything, metric = tried[0], main_metric(prepared.task)
    gained = before.metrics["loss"] - everything.loss
    if chosen is everything:
        return f"all; they lowered the held-out loss by {gained:.3f}, and no smaller depth keeps {KEEP:.0%} of that"
    kept = (before.metrics["loss"] - chosen.loss) / gained
    change = chosen.score.metrics[metric] - everything.score.metrics[metric]
    full, short = (depth.seconds(prepared.schedule.steps, seen) for depth in (everything, chosen))
    return (
        f"{chosen.name} keeps {kept:.0%} of what all {chosen.layers} lowered the held-out loss by "
        f"({metric} {change:+.3f} on {len(chosen.score.weights):,} rows), in about {short:,.0f} s, not {full:,.0f}"
    )


def _shown(found: Score) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in found.metrics.items() if name in ("accuracy", "loss"))
