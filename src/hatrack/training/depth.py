"""Compares adapters on all layers with adapters on the top layers, for `--layers auto`.

Saves a user the runs that find the N of `--layers top-N`: where a few layers are enough, an epoch takes less than half
as long (docs/log.md: 0.36x on MiniLM with 2 of 6 layers, 0.41x on SmolLM2 with 10 of 30).

Each depth trains for a few small steps on the same rows, from the same start, with the same learning rate schedule
scaled down, and is scored on the same held-out rows. The layers below the adapters are computed once per row, as in
the run itself. Weights and random state are restored. Knows nothing of recipes or files.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from hatrack.base.layer_stack import LayerStack
from hatrack.evaluate.loss import Batch
from hatrack.evaluate.score import LossRunner, Score
from hatrack.training.prefix_cache import FrozenPrefix
from hatrack.training.undone_steps import add_gradients, undo_steps

SHARES = (1 / 2, 1 / 3, 1 / 6)
"""Depths to try besides all layers, as shares of all layers."""
MIN_GAIN_SHARE = 0.95
"""A smaller depth must lower the held-out loss by this share of what all layers lower it by."""
MIN_GAIN = 0.01
"""In nats. If all layers lower the loss by less, the comparison shows nothing."""
ROWS_PART, BATCH_PART = 20, 4
"""A trial uses 1/20 of the rows of the run, in batches of 1/4 of its size. Smaller batches give more steps in the same
time, and the first few dozen steps learn too little to tell depths apart."""
MIN_STEPS, MAX_STEPS = 48, 128
"""Steps of a trial. If a run's trial would have fewer, depths are not compared."""
TIMED_STEPS = 2
"""Number of steps with the run's own batch size that are timed."""
MAX_SCORED = 256
"""Maximum number of held-out rows that are scored."""


@dataclass(frozen=True)
class MeasuredDepth:
    """The measurements of adapters on the last `top` of `layers` layers: the held-out score after the trial, the
    seconds per step with the run's batch size, and the seconds per row of the layers below, computed once per row."""

    top: int
    layers: int
    score: Score
    step_seconds: float
    seconds_below: float

    @property
    def name(self) -> str:
        """The value of --layers."""
        return "all" if self.top == self.layers else f"top-{self.top}"

    @property
    def loss(self) -> float:
        """The held-out loss."""
        return self.score.metrics["loss"]

    def seconds(self, steps: int, rows: int) -> float:
        """The expected seconds of `steps` steps, with `rows` rows through the layers below."""
        return steps * self.step_seconds + rows * self.seconds_below


@dataclass(frozen=True)
class DepthTrial:
    """The settings of a trial, the same for all depths. `small`: the micro-batches of the trial's steps; `whole`: those
    of a few steps with the run's batch size; `lr`: the peak learning rate; `score`: scores a model on held-out rows."""

    small: Sequence[Sequence[Batch]]
    whole: Sequence[Sequence[Batch]]
    task: str
    lr: float
    score: Callable[[Any, LossRunner | None], Score]


def trial_steps(steps: int) -> int:
    """Returns the steps of each trial for a run of `steps` steps; 0 if the run is too short for a comparison."""
    found = min(MAX_STEPS, BATCH_PART * steps // ROWS_PART)
    return found if found >= MIN_STEPS else 0


def depths_to_try(layers: int) -> list[int]:
    """The depths to try, all layers first.

    >>> depths_to_try(30)
    [30, 15, 10, 5]
    """
    return sorted({layers, *(max(1, round(layers * share)) for share in SHARES)}, reverse=True)


def try_depths(model: Any, stack: LayerStack, trial: DepthTrial) -> Iterator[MeasuredDepth]:
    """Measures one depth after the other, all layers first.

    `model` has adapters on all layers. A depth without adapters in its layers is skipped. Raises ValueError if the
    output of the layers below is not deterministic.
    """
    with undo_steps(model):
        add_gradients(model, trial.whole[0], trial.task)  # the first pass is slower, and would count for all layers
    for top in depths_to_try(len(stack.layers)):
        with _frozen_below(stack, len(stack.layers) - top), undo_steps(model) as parameters:
            if any(".lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad):
                yield _measure(model, stack, top, parameters, trial)


def keeps_enough(depth: MeasuredDepth, all_layers: MeasuredDepth, before: float) -> bool:
    """Whether a depth lowers the held-out loss `before` by nearly as much as all layers do. Always False if all layers
    lower it too little to compare."""
    gain = before - all_layers.loss
    return gain >= MIN_GAIN and before - depth.loss >= MIN_GAIN_SHARE * gain


def choose_depth(tried: Sequence[MeasuredDepth], before: float, steps: int, rows: int) -> MeasuredDepth:
    """Returns the fastest depth that keeps enough, else all layers (the first of `tried`)."""
    enough = [depth for depth in tried if keeps_enough(depth, tried[0], before)]
    return min(enough, key=lambda depth: depth.seconds(steps, rows)) if enough else tried[0]


def _measure(
    model: Any, stack: LayerStack, top: int, parameters: list[torch.nn.Parameter], trial: DepthTrial
) -> MeasuredDepth:
    depth, seconds_below = len(stack.layers) - top, 0.0
    prefix = FrozenPrefix(model, stack, depth, task=trial.task, states=_MemoryCache()) if depth else None
    optimizer = torch.optim.AdamW(parameters, lr=trial.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(trial.small))
    for batches in trial.small:
        add_gradients(model, batches, trial.task, prefix)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    score = trial.score(model, prefix.losses if prefix else None)
    if prefix:
        prefix.states, began, rows = _MemoryCache(), time.perf_counter(), 0
        for batch in (batch for batches in trial.whole for batch in batches):
            with prefix.use_cached(batch):  # computes the layers below, as nothing is cached yet
                rows += len(batch["labels"])
        seconds_below = (time.perf_counter() - began) / rows
    began = time.perf_counter()
    for batches in trial.whole:
        add_gradients(model, batches, trial.task, prefix)
    step_seconds = (time.perf_counter() - began) / len(trial.whole)
    return MeasuredDepth(top, len(stack.layers), score, step_seconds, seconds_below)


@contextmanager
def _frozen_below(stack: LayerStack, layers: int) -> Iterator[None]:
    """Freezes the adapters in the first `layers` layers while the block runs. Untrained, they add nothing."""
    frozen = [p for layer in stack.layers[:layers] for p in layer.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


class _MemoryCache(dict[bytes, bytes]):
    """Caches hidden states of rows in memory; a trial has few rows."""

    def read(self, key: bytes, into: memoryview) -> bool:
        """Fills `into` with a row's hidden states. Returns False if they are not cached."""
        if key in self:
            into[:] = self[key]
        return key in self

    def add(self, key: bytes, states: memoryview) -> None:
        """Caches a row's hidden states."""
        self[key] = bytes(states)

    def flush(self) -> None:
        """Does nothing: the cache ends with the trial."""
