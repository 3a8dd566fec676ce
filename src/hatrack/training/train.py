"""The main path: check, plan, load base, add adapter, train, save, verify, report."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from hatrack.adapter.count import trainable_line
from hatrack.adapter.files import save_adapter
from hatrack.adapter.proof import probe_logits, probe_tokens
from hatrack.base.free_memory import release_memory
from hatrack.check.checks import print_advice
from hatrack.check.prepared import Prepared
from hatrack.console import format_size, say
from hatrack.inference.hat import Hat
from hatrack.planning.fit import Plan
from hatrack.planning.schedule import Schedule
from hatrack.recipe import Recipe
from hatrack.storage import folder_size
from hatrack.training.adapted_model import AdaptedModel, load_adapted_model, open_layer_runners
from hatrack.training.auto_settings import choose_layers, measure_learning_rate
from hatrack.training.cost import CostMeter, compare_with_plan, start_cost_meter
from hatrack.training.describe import adapter_card, extra_adapter_files, run_result
from hatrack.training.hidden_states import HiddenStateCache
from hatrack.training.loop import train_adapter
from hatrack.training.prepare import hidden_state_cache, prepare, read_inputs
from hatrack.training.read_back import read_back
from hatrack.training.run import Run, open_run
from hatrack.training.sample_answers import check_end_token_learned
from hatrack.training.trackers import check_trackers


def train(recipe: Recipe) -> Hat:
    """Trains an adapter as `recipe` says and saves it. Returns a `Hat`: the loaded base with the saved adapter.

    `Hat.result` holds what `hatrack train --json` prints. Raises a HatrackError for any problem with the input,
    MachineError if the machine failed, Interrupted (with a checkpoint saved) on Ctrl-C.
    """
    with open_run(recipe) as (run, recipe):
        meter = start_cost_meter()
        check_trackers(recipe)
        inputs = read_inputs(recipe, template=run.resumed_value("template"))
        if recipe.layers == "auto":
            recipe = choose_layers(prepare(recipe, inputs, quiet=True))
        with hidden_state_cache(recipe, inputs) as hidden_states:
            prepared = prepare(recipe, inputs, cache=hidden_states, micro_batch=_resumed_micro_batch(run))
            print_advice(prepared)
            saved = _train_and_save(run, prepared, hidden_states, meter)
            release_memory()  # the trained model's memory, before the base is loaded a second time
            return _prove_and_report(run, prepared, saved, meter)


class _Saved(NamedTuple):
    """A trained adapter in the run's folder: its report, and its logits on the fixed probe texts.

    `plan`: the plan that training followed; its micro-batch may be smaller than `prepared.plan`'s.
    """

    result: dict[str, Any]
    plan: Plan
    logits: torch.Tensor


def _train_and_save(run: Run, prepared: Prepared, hidden_states: HiddenStateCache | None, meter: CostMeter) -> _Saved:
    """Loads the base, adds an adapter, trains it and saves it in the run's folder."""
    adapted = load_adapted_model(prepared)
    say(trainable_line(*adapted.model.get_nb_trainable_parameters()))
    schedule = _schedule_with_learning_rate(run, prepared, adapted)
    # `runners` stream a base's layers from disk, or run the frozen lower layers once per row and cache the outputs, or
    # both.
    runners = open_layer_runners(adapted, prepared, hidden_states, run.folder)

    trained = train_adapter(run, prepared, schedule, adapted, runners)

    card = adapter_card(run, prepared, trained, meter.measure(trained.seconds))
    files = extra_adapter_files(run, prepared, adapted.base)
    save_adapter(adapted.model, run.adapter_folder, card, base=prepared.base_record["source"], extra_files=files)
    logits = probe_logits(adapted.model.eval(), probe_tokens(adapted.base), adapted.base)
    return _Saved(run_result(run, trained, adapted.model), trained.plan, logits)


def _prove_and_report(run: Run, prepared: Prepared, saved: _Saved, meter: CostMeter) -> Hat:
    """Loads the saved adapter, checks that its outputs match the trained adapter's, moves it to the output folder and
    registers its name."""
    hat = read_back(run.adapter_folder, saved.logits, prepared.recipe)
    check_end_token_learned(hat, prepared.tokens.train, prepared.tokens.end_tokens)
    run.finish()
    say(f"adapter saved in {run.output} ({format_size(folder_size(run.output))}), on the rack as {run.name}")
    cost = meter.measure(saved.result["seconds"])
    say(compare_with_plan(saved.plan, cost))
    return hat.with_result(run.output, saved.result | cost)


def _resumed_micro_batch(run: Run) -> int | None:
    """The interrupted run's micro-batch size. None if no run is resumed, or if it stopped before choosing one."""
    schedule = run.resumed_value("schedule")
    return schedule["micro_batch"] if schedule else None


def _schedule_with_learning_rate(run: Run, prepared: Prepared, adapted: AdaptedModel) -> Schedule:
    """The schedule to train by. With `--lr auto`, its learning rate is measured, or reused from the interrupted run."""
    if prepared.recipe.lr != "auto":
        return prepared.schedule
    interrupted = run.resumed_value("schedule")
    lr = interrupted["lr"] if interrupted else measure_learning_rate(adapted.base, adapted.model, prepared)
    return replace(prepared.schedule, lr=lr)
