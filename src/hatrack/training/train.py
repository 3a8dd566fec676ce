"""The main path, from a recipe to a finished adapter: check, plan, load, place, train, save, prove, report."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from hatrack.adapter.count import trainable_line
from hatrack.adapter.files import save_adapter
from hatrack.adapter.proof import probe_logits, probe_tokens
from hatrack.base.free_memory import release_memory
from hatrack.check.checks import advise
from hatrack.check.prepared import Prepared
from hatrack.console import format_size, say
from hatrack.inference.hat import Hat
from hatrack.planning.fit import Plan
from hatrack.planning.schedule import Schedule
from hatrack.recipe import Recipe
from hatrack.storage import folder_size
from hatrack.training.adapted_model import AdaptedModel, load_adapted_model, open_layer_paths
from hatrack.training.auto_settings import choose_layers, measure_learning_rate
from hatrack.training.cost import CostMeter, compare_with_plan, start_cost_meter
from hatrack.training.describe import adapter_card, files_beside, run_result
from hatrack.training.hidden_states import HiddenStateCache
from hatrack.training.loop import train_adapter
from hatrack.training.prepare import open_cache, prepare, read_inputs
from hatrack.training.read_back import read_back
from hatrack.training.run import Run, open_run
from hatrack.training.sample_answers import check_answers_end
from hatrack.training.trackers import find_trackers


def train(recipe: Recipe) -> Hat:
    """Trains an adapter as `recipe` says, saves it, proves that the saved one works, and returns it ready to use.

    `Hat.result` holds what `hatrack train --json` prints. Raises a HatrackError for anything the input caused,
    MachineError where the machine failed, Interrupted (with a checkpoint saved) on Ctrl-C.
    """
    with open_run(recipe) as (run, recipe):
        meter = start_cost_meter()
        find_trackers(recipe)  # refuses unknown ones before anything is read
        inputs = read_inputs(recipe, template=run.recall("template"))
        if recipe.layers == "auto":
            recipe = choose_layers(prepare(recipe, inputs, quiet=True))
        with open_cache(recipe, inputs) as cache:
            prepared = prepare(recipe, inputs, cache=cache, micro_batch=_interrupted_micro_batch(run))
            advise(prepared)
            saved = _train_and_save(run, prepared, cache, meter)
            release_memory()  # the trained model's memory, before the base is loaded a second time
            return _prove_and_report(run, prepared, saved, meter)


class _Saved(NamedTuple):
    """A trained adapter in the run's folder: what to report, the plan it followed, and its logits for the probe."""

    result: dict[str, Any]
    plan: Plan
    logits: torch.Tensor


def _train_and_save(run: Run, prepared: Prepared, cache: HiddenStateCache | None, meter: CostMeter) -> _Saved:
    """Loads the base, places an adapter on it, trains that and saves it in the run's folder."""
    adapted = load_adapted_model(prepared)
    say(trainable_line(*adapted.model.get_nb_trainable_parameters()))
    schedule = _complete_schedule(run, prepared, adapted)
    paths = open_layer_paths(adapted, prepared, cache, run.folder)

    trained = train_adapter(run, prepared, schedule, adapted, paths)

    card = adapter_card(run, prepared, trained, meter.measure(trained.seconds))
    files = files_beside(run, prepared, adapted.base)
    save_adapter(adapted.model, run.adapter, card, base=prepared.lineage["source"], extra_files=files)
    logits = probe_logits(adapted.model.eval(), probe_tokens(adapted.base), adapted.base)
    return _Saved(run_result(run, trained, adapted.model), trained.plan, logits)


def _prove_and_report(run: Run, prepared: Prepared, saved: _Saved, meter: CostMeter) -> Hat:
    """Loads the saved adapter, compares it with the trained one, moves it to its folder and registers its name."""
    hat = read_back(run.adapter, saved.logits, prepared.recipe)
    check_answers_end(hat, prepared.tokens.train, prepared.tokens.stops.tokens)
    run.finish()
    say(f"adapter saved in {run.output} ({format_size(folder_size(run.output))}), on the rack as {run.name}")
    cost = meter.measure(saved.result["seconds"])
    say(compare_with_plan(saved.plan, cost))
    return hat.with_result(run.output, saved.result | cost)


def _interrupted_micro_batch(run: Run) -> int | None:
    """The micro-batch of the interrupted run; None where no run is resumed, or it stopped before it had a schedule."""
    schedule = run.recall("schedule")
    return schedule["micro_batch"] if schedule else None


def _complete_schedule(run: Run, prepared: Prepared, adapted: AdaptedModel) -> Schedule:
    """The schedule to train by. With `--lr auto`, measures its learning rate, or takes that of the interrupted run."""
    if prepared.recipe.lr != "auto":
        return prepared.schedule
    interrupted = run.recall("schedule")
    lr = interrupted["lr"] if interrupted else measure_learning_rate(adapted.base, adapted.model, prepared)
    return replace(prepared.schedule, lr=lr)
