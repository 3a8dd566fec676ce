"""How deep adapters need to go: a small run at each of several depths, side by side, for `--layers auto`.

Each has its own few steps on the same rows, from the same start, down the same schedule in small, and is scored on the
same held-out rows. What the layers below the adapters give is computed once for each row, as in the run itself.
Everything is put back. Knows nothing of recipes or files.
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
"""Depths that are tried beside all layers."""
KEEP = 0.95
"""A smaller depth has to keep this share of what all layers lowered the held-out loss by."""
LITTLE = 0.01
"""Nats; where all layers lowered the loss by less, the comparison tells nothing."""
PART, SMALLER = 20, 4
"""Each small run sees this part of the rows that the run itself will, in batches so many times smaller: more steps for
the same time, since the first few dozen steps, in which hardly anything is learned, tell depths not apart."""
FEWEST, MOST = 48, 128
"""Steps of a small run; for a run with fewer there is no comparison."""
TIMED = 2
"""Steps of the run's own size that are timed."""
SCORED = 256
"""Held-out rows that are scored at most."""


@dataclass(frozen=True)
class MeasuredDepth:
    """What was measured with adapters on the last `top` of `layers` layers: the held-out score after the small run,
    seconds of a whole step, and seconds a row of the layers below, which are computed once."""

    top: int
    layers: int
    score: Score
    step: float
    below: float

    @property
    def name(self) -> str:
        """As --layers takes it."""
        return "all" if self.top == self.layers else f"top-{self.top}"

    @property
    def loss(self) -> float:
        """The held-out loss."""
        return self.score.metrics["loss"]

    def seconds(self, steps: int, rows: int) -> float:
        """What so many steps will take, and so many different rows' way through the layers below."""
        return steps * self.step + rows * self.below


@dataclass(frozen=True)
class DepthTrial:
    """What every depth is tried on: the micro-batches of each step of the `small` run, those of a few steps of the
    run's own size (`whole`), its peak learning rate, and how a model is scored on held-out rows."""

    small: Sequence[Sequence[Batch]]
    whole: Sequence[Sequence[Batch]]
    task: str
    lr: float
    score: Callable[[Any, LossRunner | None], Score]


def trial_steps(steps: int) -> int:
    """Steps of each small run, for a run of so many; 0 where that is too short to be worth a comparison."""
    found = min(MOST, SMALLER * steps // PART)
    return found if found >= FEWEST else 0


def depths_to_try(layers: int) -> list[int]:
    """The depths to try, all layers first.

    >>> depths_to_try(30)
    [30, 15, 10, 5]
    """
    return sorted({layers, *(max(1, round(layers * share)) for share in SHARES)}, reverse=True)


def try_depths(model: Any, trunk: LayerStack, trial: DepthTrial) -> Iterator[MeasuredDepth]:
    """Measures one depth after the other, all layers first.

    `model` has adapters on all layers; where a smaller depth leaves none, it is not tried. Raises ValueError where what
    is below the adapters is not the same each time.
    """
    with undo_steps(model):
        add_gradients(model, trial.whole[0], trial.task)  # the first pass is slower: it would count against all layers
    for top in depths_to_try(len(trunk.layers)):
        with _still(trunk, len(trunk.layers) - top), undo_steps(model) as parameters:
            if any(".lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad):
                yield _small_run(model, trunk, top, parameters, trial)


def keeps_enough(depth: MeasuredDepth, everything: MeasuredDepth, before: float) -> bool:
    """Whether a depth lowered the held-out loss `before` by enough of what all layers lowered it by; where these hardly
    did, the comparison tells nothing, and no depth does."""
    gained = before - everything.loss
    return gained >= LITTLE and before - depth.loss >= KEEP * gained


def choose(tried: Sequence[MeasuredDepth], before: float, steps: int, rows: int) -> MeasuredDepth:
    """The fastest of those that keep enough; all layers, the first, where none does."""
    enough = [depth for depth in tried if keeps_enough(depth, tried[0], before)]
    return min(enough, key=lambda depth: depth.seconds(steps, rows)) if enough else tried[0]


def _small_run(
    model: Any, trunk: LayerStack, top: int, parameters: list[torch.nn.Parameter], trial: DepthTrial
) -> MeasuredDepth:
    depth, below = len(trunk.layers) - top, 0.0
    prefix = FrozenPrefix(model, trunk, depth, task=trial.task, states=_InMemory()) if depth else None
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
        prefix.states, began, rows = _InMemory(), time.perf_counter(), 0
        for batch in (batch for batches in trial.whole for batch in batches):
            with prefix.use_cached(batch):  # which computes what is not kept yet
                rows += len(batch["labels"])
        below = (time.perf_counter() - began) / rows
    began = time.perf_counter()
    for batches in trial.whole:
        add_gradients(model, batches, trial.task, prefix)
    return MeasuredDepth(top, len(trunk.layers), score, (time.perf_counter() - began) / len(trial.whole), below)


@contextmanager
def _still(trunk: LayerStack, layers: int) -> Iterator[None]:
    """While the block runs nothing in the first `layers` is trained: adapters there stay as they began, adding 0."""
    held = [p for layer in trunk.layers[:layers] for p in layer.parameters() if p.requires_grad]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


class _InMemory(dict[bytes, bytes]):
    """Hidden states by row: those of a slice of the data are small."""

    def read(self, key: bytes, into: memoryview) -> bool:
        """Fills `into` with a row's states, and says whether they were there."""
        if key in self:
            into[:] = self[key]
        return key in self

    def add(self, key: bytes, states: memoryview) -> None:
        """Keeps a row's states."""
        self[key] = bytes(states)

    def flush(self) -> None:
        """They go with the comparison."""
