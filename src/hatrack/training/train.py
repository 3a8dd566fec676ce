"""The main path: from a recipe to a finished adapter, read from top to bottom."""

import hashlib
import json
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, cast

import transformers
from transformers import PrinterCallback, ProgressCallback, TrainerState
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.utils import logging as transformers_logging

from hatrack.adapter.card import AdapterCard
from hatrack.adapter.count import trainable_line
from hatrack.adapter.files import save_adapter
from hatrack.adapter.proof import probe_logits, probe_tokens
from hatrack.base.description import BaseDescription
from hatrack.base.fingerprint import lineage
from hatrack.base.free_memory import release_memory
from hatrack.base.load import Base, choose_device, choose_dtype, dtype_name, load_config, load_tokenizer
from hatrack.base.sources import find_base
from hatrack.check.checks import advise
from hatrack.check.prepared import Prepared
from hatrack.check.reading import read_recipe_examples
from hatrack.console import format_size, say
from hatrack.data import trained_rows
from hatrack.data.examples import Examples
from hatrack.data.stop_tokens import Stops
from hatrack.data.tokens import Tokens, tokenize
from hatrack.errors import RecipeError
from hatrack.evaluate.score import Score
from hatrack.inference.generate import all_end_tokens
from hatrack.inference.hat import Hat
from hatrack.layers.fast_base import check_rounding
from hatrack.planning.fit import MIN_SCORED_ROWS, Plan
from hatrack.planning.machine import check_compute
from hatrack.planning.model_shape import dimensions_of
from hatrack.planning.schedule import Schedule
from hatrack.recipe import Recipe, Task, nearest
from hatrack.storage import folder_size
from hatrack.training import cost
from hatrack.training.adapted_model import load_adapted_model, open_layer_paths
from hatrack.training.auto_settings import choose_layers, measure_learning_rate
from hatrack.training.callbacks import GracefulStop, MemoryWatch, MetricsFile, ProgressBar, TooMuchMemory
from hatrack.training.checkpoint import STATE
from hatrack.training.divergence import DivergenceWatch
from hatrack.training.hidden_states import HiddenStateCache, open_hidden_state_cache, row_key
from hatrack.training.layer_streaming import LayerStreaming
from hatrack.training.prefix_cache import FrozenPrefix
from hatrack.training.read_back import read_back
from hatrack.training.run import Run, open_run
from hatrack.training.sample_answers import SampleAnswers, check_answers_end
from hatrack.training.trainer import BEST, HatTrainer, TrainerArguments, TrainerRows


def train(recipe: Recipe) -> Hat:
    """Trains an adapter as `recipe` says, saves it, proves that the saved one works, and returns it ready to use.

    `Hat.result` holds what `hatrack train --json` prints. Raises a HatrackError for anything the input caused,
    MachineError where the machine failed, Interrupted (with a checkpoint saved) on Ctrl-C.
    """
    with ExitStack() as opened:
        return _train(opened.enter_context(open_run(recipe)), cost.start_meter(), opened)


def _train(run: Run, meter: cost.Meter, opened: ExitStack) -> Hat:
    recipe = run.recipe
    trackers = _trackers(recipe)
    examples = read_recipe_examples(recipe)
    files = find_base(str(recipe.base), recipe.revision, trust=recipe.trust_remote_code)
    tokenizer, examples, tokens = _tokenise(run, files, examples)
    made_on = lineage(files, recipe.quantize)
    facts, states, known = _prepare(run, made_on, files, examples, tokenizer, tokens, opened)
    advise(facts)
    if recipe.layers == "auto":
        recipe = choose_layers(facts)
        run, facts = replace(run, recipe=recipe), replace(facts, recipe=recipe)
        if recipe.top_layers is not None:  # all layers are what was planned
            facts, states, known = _prepare(run, made_on, files, examples, tokenizer, tokens, opened)
    plan, schedule, resumed = facts.plan, facts.schedule, run.recall("schedule")
    adapted = load_adapted_model(facts, is_all_cached=known == 1)
    base, model = adapted.base, adapted.model
    say(trainable_line(*model.get_nb_trainable_parameters()))
    if recipe.lr == "auto":
        schedule = replace(schedule, lr=resumed["lr"] if resumed else measure_learning_rate(base, model, facts))
    told = {"rows": examples.digest, "base": made_on["fingerprint"], "template": tokens.template}
    sweep, prefix = open_layer_paths(adapted, facts, states, known, run.folder)

    trained, schedule = _with_rows_that_fit(
        partial(_fit, run, base, model, facts, trackers=trackers, sweep=sweep, prefix=prefix),
        schedule,
        lambda schedule: run.remember({**told, "schedule": asdict(schedule)}),
    )
    plan = replace(plan, micro_batch=schedule.micro_batch)
    took = {"planned": plan.as_json(), "actual": meter.cost(trained.seconds)}
    card = _describe(run, made_on, examples, tokens, trained, took)
    beside: dict[str, bytes | str] = {"metrics.jsonl": run.metrics.read_bytes()}
    beside[trained_rows.FILE] = trained_rows.to_bytes(trained_rows.keys(examples.train))
    if facts.task != "classify":
        beside["generation_config.json"] = _generation_config(base, tokens.stops)
    save_adapter(model, run.adapter, card, base=made_on["source"], extra_files=beside)
    answers = probe_logits(model.eval(), probe_tokens(base), base)
    result = _result(run, schedule, plan, trained, model.get_nb_trainable_parameters())
    del model, base, adapted, trained, sweep, prefix
    release_memory()  # before the base is loaded a second time
    hat = read_back(run.adapter, answers, recipe)
    check_answers_end(hat, tokens.train, tokens.stops.tokens)
    run.finish()
    say(f"adapter saved in {run.output} ({format_size(folder_size(run.output))}), on the rack as {run.name}")
    in_all = meter.cost(result["seconds"])
    say(cost.against(plan, in_all))
    return hat.with_result(run.output, result | in_all)


@dataclass(frozen=True)
class Trained:
    """What a finished run measured; `seconds` and `tokens_per_second` since it was last resumed."""

    before: Score
    after: Score
    steps: int
    tokens: int
    tokens_per_second: float
    seconds: float
    train_loss: float


def _tokenise(run: Run, files: BaseDescription, examples: Examples) -> tuple[Any, Examples, Tokens]:
    """The base's tokenizer, and the rows as its tokens."""
    task = cast(Task, examples.task)
    config = load_config(files, task=task, labels=examples.labels, multi_label=examples.multi_label)
    tokenizer = load_tokenizer(files)
    return tokenizer, *tokenize(run.recipe, examples, tokenizer, config, template=run.recall("template"))


def _prepare(
    run: Run,
    made_on: dict[str, Any],
    files: BaseDescription,
    examples: Examples,
    tokenizer: Any,
    tokens: Tokens,
    opened: ExitStack,
) -> tuple[Prepared, HiddenStateCache | None, float]:
    """What the run will take and the schedule that follows, said aloud; and what is kept of the layers below the
    adapters, with the share of rows it is kept of. Raises RecipeError where the run does not fit this machine."""
    recipe, device = run.recipe, choose_device(run.recipe.device)[0]
    check_compute(recipe.compute, device.type)
    check_rounding(recipe.compute, device.type)
    dtype = choose_dtype(recipe.dtype, device)[0]
    states = _states(recipe, files, made_on, tokenizer, examples.task, device.type, dtype_name(dtype))
    if states is not None:
        opened.callback(states.close)
    known = _known(states, tokens)
    rows = (run.recall("schedule") or {}).get("micro_batch")
    plan, schedule = cost.plan(recipe, files, examples, tokens, device, dtype, known, rows)
    return Prepared(recipe, examples, files, tokenizer, tokens, plan, schedule, dtype_name(dtype)), states, known


def _states(
    recipe: Recipe, files: BaseDescription, made_on: dict[str, Any], tokenizer: Any, task: str, device: str, dtype: str
) -> HiddenStateCache | None:
    """What is kept of the layers below the adapters. All that it depends on, besides a row's tokens, is named."""
    below = dimensions_of(files.config).layers - (recipe.top_layers or math.inf)
    if below <= 0 or recipe.cache_limit == 0:
        return None
    made_by = {
        "fingerprint": made_on["fingerprint"],
        "config": hashlib.sha256(json.dumps(files.config, sort_keys=True).encode()).hexdigest()[:16],
        "task": "classify" if task == "classify" else "generate",
        "pad": tokenizer.pad_token_id,
        "layers": below,
        "dtype": dtype,
        "quantize": recipe.quantize,
        "device": device,
        "transformers": transformers.__version__,
    }
    return open_hidden_state_cache(made_by, made_on["source"], recipe.cache_limit)


def _known(states: HiddenStateCache | None, tokens: Tokens) -> float:
    """The share of all rows whose states an earlier run has kept."""
    if not states:
        return 0.0
    keys = [row_key(rows.row(index)[0]) for rows in (tokens.train, tokens.held_out) for index in range(len(rows))]
    return sum(key in states for key in keys) / len(keys)


def _trackers(recipe: Recipe) -> list[str]:
    """The experiment trackers asked for. Raises RecipeError for one that transformers does not know or cannot find."""
    asked = [name.strip() for name in recipe.report_to.split(",") if name.strip() not in ("", "none")]
    there = get_available_reporting_integrations()
    for name in asked:
        if name not in INTEGRATION_TO_CALLBACK:
            guess = nearest(name, INTEGRATION_TO_CALLBACK)
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise RecipeError(
                f"--report-to does not know {name}", fix=f"did you mean {guess}?" if guess else f"use {known}"
            )
        if name not in there:
            raise RecipeError(f"--report-to {name} needs its package", got="not installed", fix=f"pip install {name}")
    return asked


def _with_rows_that_fit(
    fit: Callable[[Schedule], Trained], schedule: Schedule, remember: Callable[[Schedule], None]
) -> tuple[Trained, Schedule]:
    """What `fit` gives, from the start again with fewer rows at a time as long as its first step takes too much."""
    while True:
        remember(schedule)
        try:
            return fit(schedule), schedule
        except TooMuchMemory as over:
            batch, before = schedule.batch_size, schedule.micro_batch
            rows = max(count for count in range(1, before) if batch % count == 0)
            schedule = replace(schedule, micro_batch=rows)
            say(
                f"{before} rows at a time took {format_size(over.took)} of {format_size(over.limit)}: "
                f"now {rows}, of {batch} a step"
            )
        release_memory()


def _fit(
    run: Run,
    base: Base,
    model: Any,
    facts: Prepared,
    schedule: Schedule,
    trackers: list[str],
    sweep: LayerStreaming | None,
    prefix: FrozenPrefix | None,
) -> Trained:
    """Scores, trains, and scores again: the best epoch's adapter is the one that stays."""
    transformers_logging.set_verbosity_error()
    stop, bar = GracefulStop(), ProgressBar()
    memory = _memory_watch(run, facts, sweep)
    watch = DivergenceWatch(run, lr=schedule.lr, usual_lr=facts.usual_lr, dtype=facts.dtype)

    metrics = MetricsFile(run.metrics)
    asks = facts.task != "classify" and sweep is None  # each token would read a base larger than memory once
    ends = all_end_tokens(base, facts.tokens.stops.tokens) if asks else []  # classifiers have no generation settings
    answers = [SampleAnswers(facts.tokens.held_out, base, ends, metrics)] if asks else []

    def on_start_score(found: Score) -> None:
        watch.before = found.metrics["loss"]
        say(f"before training: held-out {shown(found.metrics)}")

    trainer = HatTrainer(
        model=model,
        args=_arguments(run, base, schedule, facts.plan, trackers),
        rows=TrainerRows(facts.tokens.train, facts.tokens.held_out, facts.task, base.tokenizer.pad_token_id),
        watch=watch.step,
        on_start_score=on_start_score,
        streaming=sweep,
        prefix=prefix,
        callbacks=[bar, metrics, stop, watch, memory, *answers],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    watch.few, bar.loss = trainer.loss_at_start, lambda: trainer.smoothed.value
    if sweep is None:  # a row shows the layers which of them share an input: the first step is then as it is resumed
        trainer.score_held_out(1)
    checkpoint = run.last_checkpoint()
    if checkpoint is not None:
        trainer.state = TrainerState.load_from_json(str(checkpoint / STATE))
        say(f"going on from step {trainer.state.global_step:,} of {schedule.steps:,}")
    else:
        say("held-out rows are scored after each epoch; the score before training comes with the first")
    earlier, began = int(trainer.state.num_input_tokens_seen), time.monotonic()
    if trainer.state.global_step < schedule.steps:
        with stop.listening(), bar.shown(), trainer.restarting_on(TooMuchMemory):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds, state = time.monotonic() - began - sum(each.took for each in answers), trainer.state
    if stop.stopped and state.global_step < schedule.steps:
        raise run.interrupted()
    before, after = trainer.score_at_start(), trainer.score_best()
    say(f"after training: held-out {shown(after.metrics)}")
    seen, loss = int(state.num_input_tokens_seen), _mean_loss(state.log_history)
    return Trained(before, after, state.global_step, seen, (seen - earlier) / max(seconds, 1e-9), seconds, loss)


def _memory_watch(run: Run, facts: Prepared, sweep: LayerStreaming | None) -> MemoryWatch:
    """A run that goes on keeps its rows at a time, and so does a sweep, whose steps hold what their plan says."""
    settled = sweep is not None or run.recipe.resume
    return MemoryWatch(facts.plan.peak_memory_bytes, None if settled else facts.plan.limit)


def _arguments(run: Run, base: Base, schedule: Schedule, plan: Plan, trackers: list[str]) -> TrainerArguments:
    return TrainerArguments(
        output_dir=str(run.folder),
        per_device_train_batch_size=schedule.micro_batch,
        per_device_eval_batch_size=max(schedule.micro_batch, MIN_SCORED_ROWS),
        gradient_accumulation_steps=schedule.accumulation,
        max_steps=schedule.steps,
        learning_rate=schedule.lr,
        lr_scheduler_type="linear",
        warmup_steps=schedule.warmup_steps,
        weight_decay=0.0,
        optim="adamw_torch_fused" if base.device.type == "cuda" else "adamw_torch",
        seed=run.recipe.seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        metric_for_best_model=BEST,
        greater_is_better=True,
        logging_steps=max(1, schedule.steps // 100),
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        report_to=trackers or "none",
        run_name=run.name,
        use_cpu=base.device.type == "cpu",
        dataloader_pin_memory=base.device.type == "cuda",
        disable_tqdm=True,
        streamed=base.streamed,
    )


def _mean_loss(history: list[dict[str, float]]) -> float:
    """The mean of the logged losses, each weighed by the steps it stands for; a resumed run's earlier part counts."""
    total, last = 0.0, 0
    for entry in history:
        if "loss" in entry:
            total, last = total + entry["loss"] * (entry["step"] - last), int(entry["step"])
    return total / max(last, 1)


def _describe(
    run: Run, made_on: dict[str, Any], examples: Examples, tokens: Tokens, trained: Trained, took: dict[str, Any]
) -> AdapterCard:
    return AdapterCard(
        name=run.name,
        base=made_on,
        task=examples.task,
        labels=examples.labels,
        multi_label=examples.multi_label,
        template=tokens.template,
        end_tokens=list(tokens.stops.tokens),
        stop_strings=list(tokens.stops.strings),
        max_length=tokens.max_length,
        recipe=run.recipe.explicit_options(),
        data={
            "source": str(run.recipe.data),
            "rows": len(tokens.train),
            "held_out": len(tokens.held_out),
            "digest": examples.digest,
        },
        metrics={"before": trained.before.metrics, "after": trained.after.metrics},
        cost=took,
    )


def _generation_config(base: Base, ends: Stops) -> str:
    """What plain transformers and vLLM read: the base's own settings, and where an answer of the adapter ends."""
    own = base.model.generation_config.to_diff_dict()
    own.pop("_from_model_config", None)  # would have transformers take the base's end for it
    more = {"eos_token_id": all_end_tokens(base, ends.tokens), "pad_token_id": base.tokenizer.pad_token_id}
    texts = {"stop_strings": list(ends.strings)} if ends.strings else {}
    return json.dumps(own | more | texts, indent=2) + "\n"


def _result(run: Run, schedule: Schedule, plan: Plan, trained: Trained, parameters: tuple[int, int]) -> dict[str, Any]:
    """What `hatrack train --json` prints. `seconds` are those of training and of scoring, without loading and
    without the sample answers."""
    return {
        "adapter": str(run.output),
        "name": run.name,
        "trainable": parameters[0],
        "total": parameters[1],
        "seconds": round(trained.seconds, 3),
        "steps": trained.steps,
        "tokens": trained.tokens,
        "tokens_per_second": round(trained.tokens_per_second, 1),
        "train_loss": trained.train_loss,
        "before": trained.before.metrics,
        "eval": trained.after.metrics,
        "planned": {"steps": schedule.steps, **plan.as_json()},
    }


def shown(metrics: dict[str, float]) -> str:
    """Metrics as people read them: `accuracy 0.795, loss 0.441`."""
    return ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
