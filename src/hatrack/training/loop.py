"""Runs the training loop: transformers' Trainer with hatrack's callbacks; scores before and after.

Starts over with a smaller micro-batch if the first step exceeds the memory limit.
"""

import time
from dataclasses import asdict, dataclass, replace

from transformers import PrinterCallback, ProgressCallback, TrainerState
from transformers.utils import logging as transformers_logging

from hatrack.base.free_memory import release_memory
from hatrack.check.prepared import Prepared
from hatrack.console import format_size, say
from hatrack.evaluate.score import Score
from hatrack.inference.generate import all_end_tokens
from hatrack.planning.fit import MIN_SCORED_ROWS, Plan
from hatrack.planning.schedule import Schedule
from hatrack.training.adapted_model import AdaptedModel, LayerRunners
from hatrack.training.callbacks import (
    GracefulStop,
    MemoryWatch,
    MetricsFile,
    ProgressBar,
    TooMuchMemory,
    format_metrics,
)
from hatrack.training.checkpoint import STATE
from hatrack.training.divergence import DivergenceWatch
from hatrack.training.run import Run
from hatrack.training.sample_answers import SampleAnswers
from hatrack.training.trackers import tracker_names
from hatrack.training.trainer import BEST, HatTrainer, TrainerArguments, TrainerRows


@dataclass(frozen=True)
class Trained:
    """The measurements of a finished training loop, with the `plan` and `schedule` it followed.

    `before` and `after` are held-out scores. `seconds` (of training and scoring) and `tokens_per_second` are since the
    run was last resumed; `steps`, `tokens` (without padding) and `train_loss`, the mean, are of the whole run.
    """

    plan: Plan
    schedule: Schedule
    before: Score
    after: Score
    steps: int
    tokens: int
    tokens_per_second: float
    seconds: float
    train_loss: float


def train_adapter(
    run: Run, prepared: Prepared, schedule: Schedule, adapted: AdaptedModel, runners: LayerRunners
) -> Trained:
    """Trains the adapter of `adapted`, and leaves the best epoch's adapter in it.

    The micro-batch with the longest rows comes first. If it takes too much memory, training starts over with the next
    smaller micro-batch size that divides the batch. Raises Diverged if the loss diverges, Interrupted if the user stops
    the run.
    """
    while True:
        _save_values(run, prepared, schedule)
        try:
            return _train_once(run, prepared, schedule, adapted, runners)
        except TooMuchMemory as excess:
            batch, before = schedule.batch_size, schedule.micro_batch
            fewer = max(count for count in range(1, before) if batch % count == 0)
            schedule = replace(schedule, micro_batch=fewer)
            say(
                f"a micro-batch of {before} rows took {format_size(excess.used)} of {format_size(excess.limit)}: "
                f"starting over with {fewer} of the {batch} rows per step"
            )
        release_memory()


def _save_values(run: Run, prepared: Prepared, schedule: Schedule) -> None:
    """Records the run's data, base and schedule; a resumed run must have the same."""
    values = {
        "rows": prepared.examples.digest,
        "base": prepared.base_record["fingerprint"],
        "template": prepared.tokens.template,
        "schedule": asdict(schedule),
    }
    run.save_values(prepared.recipe, values)


def _train_once(
    run: Run, prepared: Prepared, schedule: Schedule, adapted: AdaptedModel, runners: LayerRunners
) -> Trained:
    """Trains to the end of the schedule, from the newest checkpoint if there is one, and scores."""
    transformers_logging.set_verbosity_error()
    stop, bar, metrics = GracefulStop(), ProgressBar(), MetricsFile(run.metrics)
    watch = DivergenceWatch(
        prepared.recipe, run.folder, lr=schedule.lr, usual_lr=prepared.usual_lr, dtype=prepared.dtype
    )
    answers = _sample_answers(prepared, adapted, metrics)

    def on_start_score(score: Score) -> None:
        watch.start_loss = score.metrics["loss"]
        say(f"before training: held-out {format_metrics(score.metrics)}")

    trainer = HatTrainer(
        model=adapted.model,
        args=_arguments(run, prepared, schedule, adapted),
        rows=TrainerRows(
            prepared.tokens.train, prepared.tokens.held_out, prepared.task, adapted.base.tokenizer.pad_token_id
        ),
        watch=watch.step,
        on_start_score=on_start_score,
        streaming=runners.streaming,
        prefix=runners.prefix,
        callbacks=[bar, metrics, stop, watch, _memory_watch(run, prepared, runners), *answers],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    watch.estimate_start_loss, bar.loss = trainer.loss_at_start, lambda: trainer.smoothed.value
    if runners.streaming is None:
        trainer.score_held_out(1)  # layers find out which of them share an input: a resumed run's first step knows too
    checkpoint = run.last_checkpoint()
    if checkpoint is not None:
        trainer.state = TrainerState.load_from_json(str(checkpoint / STATE))
        say(f"going on from step {trainer.state.global_step:,} of {schedule.steps:,}")
    else:
        say("held-out rows are scored after each epoch; the score before training comes with the first")
    tokens_before, began = int(trainer.state.num_input_tokens_seen), time.monotonic()
    if trainer.state.global_step < schedule.steps:
        with stop.listening(), bar.shown(), trainer.restarting_on(TooMuchMemory):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds, state = time.monotonic() - began - sum(each.took for each in answers), trainer.state
    if stop.stopped and state.global_step < schedule.steps:
        raise run.interrupted()
    before, after = trainer.score_at_start(), trainer.score_best()
    say(f"after training: held-out {format_metrics(after.metrics)}")
    tokens = int(state.num_input_tokens_seen)
    return Trained(
        plan=replace(prepared.plan, micro_batch=schedule.micro_batch),
        schedule=schedule,
        before=before,
        after=after,
        steps=state.global_step,
        tokens=tokens,
        tokens_per_second=(tokens - tokens_before) / max(seconds, 1e-9),
        seconds=seconds,
        train_loss=_mean_loss(state.log_history),
    )


def _sample_answers(prepared: Prepared, adapted: AdaptedModel, metrics: MetricsFile) -> list[SampleAnswers]:
    """The callback that answers held-out questions. None for classifiers, nor with a streamed base, which would be read
    from disk once per generated token."""
    if prepared.task == "classify" or adapted.base.streamed:
        return []
    ends = all_end_tokens(adapted.base, prepared.tokens.end_tokens)
    return [SampleAnswers(prepared.tokens.held_out, adapted.base, ends, metrics)]


def _memory_watch(run: Run, prepared: Prepared, runners: LayerRunners) -> MemoryWatch:
    """The callback that enforces the memory limit. Without a limit if the micro-batch size must not change: in a
    resumed run, and with layer streaming, which keeps to the plan."""
    is_fixed = run.resumed or runners.streaming is not None
    return MemoryWatch(prepared.plan.peak_memory_bytes, None if is_fixed else prepared.plan.limit)


def _arguments(run: Run, prepared: Prepared, schedule: Schedule, adapted: AdaptedModel) -> TrainerArguments:
    device = adapted.base.device.type
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
        optim="adamw_torch_fused" if device == "cuda" else "adamw_torch",
        seed=prepared.recipe.seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        metric_for_best_model=BEST,
        greater_is_better=True,
        logging_steps=max(1, schedule.steps // 100),
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        report_to=tracker_names(prepared.recipe) or "none",
        run_name=run.name,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device == "cuda",
        disable_tqdm=True,
        streamed=adapted.base.streamed,
    )


def _mean_loss(history: list[dict[str, float]]) -> float:
    """The mean training loss. Each logged loss is the mean over the steps since the previous log entry."""
    total, last = 0.0, 0
    for entry in history:
        if "loss" in entry:
            total, last = total + entry["loss"] * (entry["step"] - last), int(entry["step"])
    return total / max(last, 1)
